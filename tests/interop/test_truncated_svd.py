"""The truncated decomposition: as good as the full one, for every decay of the singular values."""

import pytest
import torch
from torch import Tensor

from dynlora_fn.interop._truncated_svd import truncated_svd
from dynlora_fn.testing import normal

SIZE = 320
INDEX = torch.arange(1, SIZE + 1, dtype=torch.float64)
SPECTRA = {
    "all equal": torch.ones_like(INDEX),
    "power of a tenth": INDEX**-0.1,
    "power of a half": INDEX**-0.5,
    "linear to zero": (SIZE + 1 - INDEX) / SIZE,
    "slowly exponential": 0.99**INDEX,
    "fast exponential": 0.5**INDEX,
    "one cluster before another": torch.where(INDEX <= 20, 1.0, 0.9).double(),
    "low rank": torch.where(INDEX <= 6, 1 / INDEX, 0.0),
    "low rank and rounding": torch.where(INDEX <= 6, 1 / INDEX, 1e-8),
    "zero": torch.zeros_like(INDEX),
}


def orthonormal(seed: int, rows: int) -> Tensor:
    return torch.linalg.qr(normal(seed, rows, SIZE)).Q


@pytest.mark.parametrize("rank", [1, 6, 40])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_error_is_the_least(name: str, rank: int):
    spectrum = SPECTRA[name]
    for rows, transposed in ((SIZE, False), (SIZE + 80, False), (SIZE + 80, True)):
        matrix = (orthonormal(0, rows) * spectrum) @ orthonormal(1, SIZE).mT
        matrix = matrix.mT if transposed else matrix
        u, s, vh = truncated_svd(matrix, rank)
        assert (u.shape, s.shape, vh.shape) == ((matrix.shape[0], rank), (rank,), (rank, matrix.shape[1]))
        rounding = 1e-14 * matrix.norm()
        assert (matrix - (u * s) @ vh).norm() <= (1 + 1e-7) * spectrum[rank:].norm() + rounding
        torch.testing.assert_close(u.mT @ u, torch.eye(rank, dtype=torch.float64))
        torch.testing.assert_close(vh @ vh.mT, torch.eye(rank, dtype=torch.float64))
        assert (s.diff() <= rounding).all()


def test_the_full_rank_restores_the_matrix():
    matrix = normal(0, 7, 12)
    u, s, vh = truncated_svd(matrix, 7)
    torch.testing.assert_close((u * s) @ vh, matrix)


def test_it_is_reproducible_and_leaves_the_global_generator():
    matrix, before = normal(0, 90, 80), torch.get_rng_state()
    results = truncated_svd(matrix, 2), truncated_svd(matrix.clone(), 2)
    assert all(map(torch.equal, *results))
    assert torch.equal(torch.get_rng_state(), before)
