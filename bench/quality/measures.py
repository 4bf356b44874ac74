"""Measure how a run changes the weights."""

from collections.abc import Mapping
from statistics import mean
from typing import Any

import torch
from torch import Tensor


def effective_rank(matrices: Tensor) -> Tensor:
    """Return the effective rank of each matrix (Roy and Vetterli, EUSIPCO 2007).

    It is the exponential of the entropy of the normalized singular values.
    """
    values = torch.linalg.svdvals(matrices.double())
    weights = values / values.sum(-1, keepdim=True).clamp(min=1e-300)
    return (-torch.special.xlogy(weights, weights).sum(-1)).exp()


def overlap(before: Tensor, after: Tensor) -> Tensor:
    """Return the overlap of the row spans of two matrices, from 0 to 1.

    Both have the shape (*stack, rank, n). Equal spans give 1, and random spans give rank / n on average.
    """
    first, second = (torch.linalg.qr(rows.double().mT).Q for rows in (before, after))
    return (first.mT @ second).square().sum((-1, -2)) / before.shape[-2]


class Tracker:
    """A recorder of the changes of the inner matrices over a run."""

    def __init__(self, weights: Mapping[str, Tensor]):
        self._first = self._inner(weights)
        self._last = self._first
        self._moved: list[float] = []

    def _inner(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: leaf.clone() for name, leaf in weights.items() if name.startswith("layers.") and leaf.ndim == 3}

    def record(self, weights: Mapping[str, Tensor]) -> None:
        """Record the change since the last call."""
        now = self._inner(weights)
        self._moved.append(_norm({name: leaf - self._last[name] for name, leaf in now.items()}))
        self._last = now

    def measures(self) -> dict[str, Any]:
        """Return the effective rank and the norm of the change over the run."""
        changes = {name: leaf - self._first[name] for name, leaf in self._last.items()}
        fractions = [effective_rank(change) / min(change.shape[-2:]) for change in changes.values()]
        return {
            "effective_rank_share": mean(fraction.mean().item() for fraction in fractions),
            "update_norm": _norm(changes) / _norm(self._first),  # relative to the norm of the initial weights
            "norms_between_evaluations": self._moved,
        }


def _norm(weights: Mapping[str, Tensor]) -> float:
    return torch.stack([leaf.double().square().sum() for leaf in weights.values()]).sum().sqrt().item()
