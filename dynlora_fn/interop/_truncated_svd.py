"""Compute only the leading singular vectors of a matrix."""

from typing import NamedTuple

import torch
from torch import Tensor

OVERSAMPLING = 8  # vectors of a block beyond the rank
LARGEST_SUBSPACE = 2  # the subspace has at most min(out, in) / 2 vectors; beyond that a full decomposition is cheaper
LEAST_RESIDUAL = 1e-3  # of the squared norm; if less is cut, the rounding of squares would matter


class SVD(NamedTuple):
    """A truncated singular value decomposition, ``u @ diag(s) @ vh``."""

    u: Tensor  # (rows, rank)
    s: Tensor  # (rank,), descending
    vh: Tensor  # (rank, columns)


def truncated_svd(matrix: Tensor, rank: int) -> SVD:
    """Return the leading singular values and vectors of a matrix.

    Cutting the matrix to them has an error of at most 1 + 1e-7 times the least possible one. Rounding to float32 costs
    more. The same matrix gives the same result, and no global generator is read.

    This is block Krylov iteration (arXiv:1504.05477, algorithm 2) from a random block of ``rank + 8`` vectors. It ends
    when another block would lower the error by less than 1e-7 of it. If half of all vectors do not suffice, all
    eigenvectors of the Gram matrix are computed. They are exact enough if the error is above 3 % of the norm. Otherwise
    the full decomposition is computed.

    Args:
        matrix: The matrix (rows, columns) in float64. All entries are finite.
        rank: The number of singular values, at most min(rows, columns).

    Returns:
        The decomposition.
    """
    if matrix.shape[0] < matrix.shape[1]:
        u, s, vh = truncated_svd(matrix.mT, rank)
        return SVD(vh.mT, s, u.mT)
    subspace = _converged_subspace(matrix, rank)
    if subspace is None:
        subspace = _leading_eigenvectors(matrix, rank)
    if subspace is None:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return SVD(u[:, :rank], s[:rank], vh[:rank])
    basis, images = subspace
    rotation, s, u = torch.linalg.svd(images, full_matrices=False)
    return SVD(u[:rank].mT, s[:rank], rotation[:, :rank].mT @ basis)


def _converged_subspace(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """Return orthonormal rows (k, columns) and their images ``rows @ matrix.T``.

    Return None if k would be too large. The squared norm that the rows capture is the sum of the `rank` largest
    eigenvalues of ``images @ images.T``. Vectors are rows, because a product with few rows is several times faster than
    a product with few columns.
    """
    columns, width = matrix.shape[1], rank + OVERSAMPLING
    limit = columns // LARGEST_SUBSPACE
    basis, images = matrix.new_empty(limit, columns), matrix.new_empty(limit, matrix.shape[0])
    gram, total, captured = matrix.new_zeros(limit, limit), matrix.norm().item() ** 2, -1.0
    block = _orthonormal_rows(_random(width, columns, like=matrix))
    for size in range(width, limit + 1, width):
        if size > columns // 4 and total - captured < LEAST_RESIDUAL * total:
            return None  # `_tolerance` would be a large part of so small an error; the full decomposition is exact
        new = slice(size - width, size)
        basis[new], images[new] = block, block @ matrix.mT
        gram[new, :size] = images[new] @ images[:size].mT
        before, captured = captured, torch.linalg.eigvalsh(gram[:size, :size])[-rank:].sum().item()
        if before >= 0 and captured - before <= _tolerance(total, captured):
            return basis[:size], images[:size]
        block = images[new] @ matrix
        for _ in range(2):  # a block inside the span leaves only rounding errors, which the second pass orthogonalizes
            block = _orthonormal_rows(block - (block @ basis[:size].mT) @ basis[:size])
    return None


def _leading_eigenvectors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """Return the leading right singular vectors as rows, and their images.

    They are eigenvectors of the Gram matrix ``matrix.T @ matrix``, which take a third of the time of the full
    decomposition. Rounding of the Gram matrix turns them, so that they miss about 1e-16 of the squared norm. Return
    None if so little is cut that this would matter.
    """
    values, vectors = torch.linalg.eigh(matrix.mT @ matrix)
    if values[:-rank].sum() < LEAST_RESIDUAL * values.sum():
        return None
    basis = vectors[:, -rank:].mT.contiguous()
    return basis, basis @ matrix.mT


def _tolerance(total: float, captured: float) -> float:
    """Return the gain of a block below which the iteration ends.

    The gain is an increase of the captured squared norm. The second term is the rounding of `total` and `captured`.
    """
    return torch.finfo(torch.float32).eps / 4 * max(total - captured, 0) + 8 * torch.finfo(torch.float64).eps * total


def _orthonormal_rows(block: Tensor) -> Tensor:
    columns: Tensor = torch.linalg.qr(block.mT).Q
    return columns.mT.contiguous()


def _random(*shape: int, like: Tensor) -> Tensor:
    """Return the same normal numbers on every device."""
    numbers = torch.randn(*shape, dtype=like.dtype, device="cpu", generator=torch.Generator().manual_seed(0))
    return numbers.to(like.device)
