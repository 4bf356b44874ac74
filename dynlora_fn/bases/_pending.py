"""Treat the pending folds of a weight as additional slots of its factors."""

from typing import NamedTuple

import torch
from torch import Tensor

from dynlora_fn._core._types import Factors, LowRank, ShardedFactors
from dynlora_fn.bases._base import PendingFold, StoredBase, as_base
from dynlora_fn.bases._sharded_factors import gather_factors


class BaseAndFactors(NamedTuple):
    """A weight without pending folds, ``base + b @ a / rank``.

    `rank` is the rank of these factors.
    """

    base: StoredBase
    factors: Factors


def rank_with_pending(param: LowRank) -> int:
    """Return the rank of the factors that `with_pending` returns."""
    pending = sum([fold.factors.b.shape[-1] for fold in as_base(param.base).pending_folds])
    return param.factors.b.shape[-1] + pending


def with_pending(param: LowRank, dtype: torch.dtype | None = None) -> BaseAndFactors:
    """Return the weight with its pending folds as additional slots.

    Sharded factors are gathered. Collective in that case: call it on every process.

    Args:
        param: The weight.
        dtype: The dtype of joined factors. A wide one does not round them. Default None means that of the factors.
    """
    base, factors = as_base(param.base), param.factors
    if isinstance(factors, ShardedFactors):
        return BaseAndFactors(param.base, gather_factors(factors))
    if not base.pending_folds:
        return BaseAndFactors(param.base, factors)
    rank, (b, a) = factors.b.shape[-1], (side.to(dtype or side.dtype) for side in factors)
    b = torch.cat([b, *[_left(fold, rank, b.dtype) for fold in base.pending_folds]], -1)
    a = torch.cat([a, *[fold.factors.a.to(a.dtype) for fold in base.pending_folds]], -2)
    return BaseAndFactors(base.folded, Factors(b * (b.shape[-1] / rank), a))


def _left(fold: PendingFold, rank: int, dtype: torch.dtype) -> Tensor:
    """Return the left factor of a pending fold, as if its divisor were `rank`."""
    left = fold.factors.b.to(dtype)
    return left if fold.divisor == rank else left * (rank / fold.divisor)
