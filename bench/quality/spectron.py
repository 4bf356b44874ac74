"""Train factors without a base: Spectron (arXiv:2602.12429)."""

from collections.abc import Iterator
from math import sqrt
from typing import Any

import torch
from torch import Tensor

import dynlora_fn as dl
from bench.quality.job import Job, is_inner, optimizer_of, rounded
from bench.quality.runs import Run
from bench.support.process_memory import count_bytes


class Spectron:
    """A run in which each inner matrix is ``b @ a``, and nothing else is stored.

    It starts as the best approximation of the initial matrix. Muon orthogonalizes both factors as matrices. The rate of
    both is ``lr / (norm(b) + norm(a) + 1)`` with spectral norms, so the spectral norm of the change of ``b @ a`` is at
    most `lr`.
    """

    def __init__(self, job: Job, run: Run):
        settings = run.settings()._replace(optimizer="muon", coefficients="polar_express_8")
        self._run, self._update = run, job.update(settings, run.rank(), "only factors")
        weights = dl.init(job.initial(run.seed), rank=1, seed=run.seed, targets=[])
        self._inner = list(filter(is_inner, weights))
        trainable = {name: leaf for name, leaf in weights.items() if not is_inner(name)}
        for name in self._inner:
            trainable |= zip(_sides(name), best_factors(weights[name], run.rank()), strict=True)
        self._state = (trainable, optimizer_of(settings).init(trainable))

    def _factors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        trainable = self._state[0]
        for name in self._inner:
            b, a = (trainable[side] for side in _sides(name))
            yield name, b, a

    def weights(self) -> dict[str, Tensor]:
        whole = {name: leaf for name, leaf in self._state[0].items() if not is_inner(name)}
        return whole | {name: b @ a for name, b, a in self._factors()}

    def update(self, step: int, grads: dict[str, Tensor], tokens: Tensor, scale: float) -> None:
        lr = torch.tensor(self._run.lr * scale)
        projected = {name: grad for name, grad in grads.items() if not is_inner(name)}
        rates = dict.fromkeys(projected, lr * self._run.dense_lr)
        for name, b, a in self._factors():
            in_b, in_a = _sides(name)
            projected |= {in_b: grads[name] @ a.mT, in_a: b.mT @ grads[name]}
            radius = lr / (spectral_norm(b) + spectral_norm(a) + 1)
            # Muon multiplies the orthogonalized directions by these roots.
            rates |= {in_b: radius / sqrt(max(b.shape[-2:])), in_a: radius / sqrt(max(a.shape[-2:]))}
        self._state, _ = self._update(self._state, rounded(projected, self._run.gradients), rates)

    def bytes(self) -> dict[str, int]:
        factors = [factor for _, *both in self._factors() for factor in both]
        return {"state": count_bytes(self._state[1]), "factors": count_bytes(factors), "bases": 0}

    def measures(self) -> dict[str, Any]:
        return {}


def _sides(name: str) -> tuple[str, str]:
    return f"{name}.b", f"{name}.a"


def best_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors of the best approximation.

    They have shapes (..., out, rank) and (..., rank, in), and equal singular values.
    """
    u, values, v = torch.linalg.svd(weight, full_matrices=False)
    roots = values[..., :rank].sqrt()
    return u[..., :rank] * roots[..., None, :], roots[..., :, None] * v[..., :rank, :]


def spectral_norm(matrix: Tensor) -> Tensor:
    """Return the largest singular values of (..., m, n), in shape (..., 1, 1)."""
    gram = matrix @ matrix.mT if matrix.shape[-2] < matrix.shape[-1] else matrix.mT @ matrix
    return torch.linalg.eigvalsh(gram)[..., -1:, None].clamp(min=0).sqrt()
