"""What a run does to the weights, beside their loss."""

from collections.abc import Mapping
from statistics import mean
from typing import Any

import torch
from torch import Tensor


def effective_rank(matrices: Tensor) -> Tensor:
    """exp(entropy of the singular values, as shares of their sum) (Roy and Vetterli, EUSIPCO 2007), (*stack,)."""
    values = torch.linalg.svdvals(matrices.double())
    shares = values / values.sum(-1, keepdim=True).clamp(min=1e-300)
    return (-torch.special.xlogy(shares, shares).sum(-1)).exp()


def overlap(before: Tensor, after: Tensor) -> Tensor:
    """Share in [0, 1] of the rows' span that two matrices (*stack, rank, n) have in common: 1 for the same span, and
    rank / n on average for random ones."""
    first, second = (torch.linalg.qr(rows.double().mT).Q for rows in (before, after))
    return (first.mT @ second).square().sum((-1, -2)) / before.shape[-2]


class Tracker:
    """Follows the weights that have rows and columns, embedding and head excepted."""

    def __init__(self, weights: Mapping[str, Tensor]):
        self._first = self._inner(weights)
        self._last = self._first
        self._moved: list[float] = []

    def _inner(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: leaf.clone() for name, leaf in weights.items() if name.startswith("layers.") and leaf.ndim == 3}

    def look(self, weights: Mapping[str, Tensor]) -> None:
        now = self._inner(weights)
        self._moved.append(_norm({name: leaf - self._last[name] for name, leaf in now.items()}))
        self._last = now

    def measures(self) -> dict[str, Any]:
        changes = {name: leaf - self._first[name] for name, leaf in self._last.items()}
        shares = [effective_rank(change) / min(change.shape[-2:]) for change in changes.values()]
        return {
            "effective_rank_share": mean(share.mean().item() for share in shares),
            "update_norm": _norm(changes) / _norm(self._first),  # of all of the run, over the initial weights'
            "norms_between_evaluations": self._moved,
        }


def _norm(weights: Mapping[str, Tensor]) -> float:
    return torch.stack([leaf.double().square().sum() for leaf in weights.values()]).sum().sqrt().item()
