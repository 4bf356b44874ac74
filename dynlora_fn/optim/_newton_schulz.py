"""Orthogonalize matrices with Newton-Schulz steps, which need no decomposition."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dynlora_fn.optim._roots import divide, square_root

# Five steps of x -> x (a + b x^2 + c x^4) bring every singular value from 1e-2 to 1 between 0.68 and 1.14: the
# coefficients of Muon (Jordan et al., 2024), chosen for their slope at zero.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5


def orthogonalize(matrix: Float[Tensor, "*stack out in"]) -> Float[Tensor, "*stack out in"]:
    """Bring all singular values near 1, except zeros.

    The singular vectors do not change.
    """
    is_tall = matrix.shape[-2] > matrix.shape[-1]
    x = divide_by_norm(matrix.mT if is_tall else matrix, dim=(-2, -1))
    first, third, fifth = _COEFFICIENTS
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = first * x + (third * gram + fifth * gram @ gram) @ x
    return x.mT if is_tall else x


def orthogonalize_shards(
    shards: Sequence[Float[Tensor, "*stack rank n"]], sum_over_processes: Callable[[Tensor], Tensor]
) -> list[Float[Tensor, "*stack rank n"]]:
    """Orthogonalize matrices that are sharded by columns.

    One all-reduce serves all of them. Every step multiplies a matrix by a polynomial of its Gram matrix, which is the
    sum of the shards' Gram matrices.
    """
    gram = sum_over_processes(torch.stack([shard @ shard.mT for shard in shards]))
    square = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp(min=torch.finfo(gram.dtype).tiny)
    gram, identity = gram / square, torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    first, third, fifth = _COEFFICIENTS
    all_steps = identity
    for _ in range(_STEPS):
        step = first * identity + third * gram + fifth * gram @ gram
        all_steps, gram = step @ all_steps, step @ gram @ step
    return [steps @ shard for steps, shard in zip(all_steps / square.sqrt(), shards, strict=True)]


def divide_by_norm(matrix: Tensor, dim: int | tuple[int, int]) -> Tensor:
    """Divide by the norm along `dim`. Zeros stay zeros."""
    quotient: Tensor = divide(matrix, norm(matrix, dim))
    return quotient


def norm(matrix: Tensor, dim: int | tuple[int, int]) -> Tensor:
    """Return the norm along `dim`, which stays an axis of size 1."""
    root: Tensor = square_root(matrix.square().sum(dim, keepdim=True))
    return root
