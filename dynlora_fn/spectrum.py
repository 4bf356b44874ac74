"""Matrices whose singular values are all alike, without a singular value decomposition."""

import torch
from jaxtyping import Float
from torch import Tensor

# Five steps of x -> x (a + b x^2 + c x^4) bring every singular value from 1e-2 to 1 between 0.68 and 1.14: the
# coefficients of Muon (Jordan et al., 2024), chosen for their slope at zero.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_STEPS = 5


def with_even_spectrum(rest: Float[Tensor, "*stack out in"]) -> Float[Tensor, "*stack out in"]:
    """The same singular vectors, all singular values near 1, zeros apart."""
    is_tall = rest.shape[-2] > rest.shape[-1]
    x = over_norm(rest.mT if is_tall else rest, dim=(-2, -1))
    first, third, fifth = _NEWTON_SCHULZ
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = first * x + (third * gram + fifth * gram @ gram) @ x
    return x.mT if is_tall else x


def over_norm(matrix: Tensor, dim: int | tuple[int, int]) -> Tensor:
    """Zeros stay zeros."""
    return matrix / norm(matrix, dim).clamp(min=torch.finfo(matrix.dtype).tiny)


def norm(matrix: Tensor, dim: int | tuple[int, int]) -> Tensor:
    return matrix.square().sum(dim, keepdim=True).sqrt()
