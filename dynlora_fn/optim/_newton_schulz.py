"""Matrices whose singular values are all alike, without a singular value decomposition."""

from collections.abc import Callable, Sequence

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


def with_even_spectra(
    parts: Sequence[Float[Tensor, "*stack rank n"]], total: Callable[[Tensor], Tensor]
) -> list[Float[Tensor, "*stack rank n"]]:
    """The same of matrices of which each process holds some columns, by one `total` over the processes: all that the
    steps multiply a matrix by is made of its Gram matrix, and that is the sum of those of the parts."""
    gram = total(torch.stack([part @ part.mT for part in parts]))
    square = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp(min=torch.finfo(gram.dtype).tiny)
    gram, identity = gram / square, torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    first, third, fifth = _NEWTON_SCHULZ
    all_steps = identity
    for _ in range(_STEPS):
        step = first * identity + third * gram + fifth * gram @ gram
        all_steps, gram = step @ all_steps, step @ gram @ step
    return [one @ part for one, part in zip(all_steps / square.sqrt(), parts, strict=True)]


def over_norm(matrix: Tensor, dim: int | tuple[int, int]) -> Tensor:
    """Zeros stay zeros."""
    return matrix / norm(matrix, dim).clamp(min=torch.finfo(matrix.dtype).tiny)


def norm(matrix: Tensor, dim: int | tuple[int, int]) -> Tensor:
    return matrix.square().sum(dim, keepdim=True).sqrt()
