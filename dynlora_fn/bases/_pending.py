"""Treat the pending folds of a weight as additional slots of its factors."""

import torch
from torch import Tensor

from dynlora_fn._core._types import Factors, LowRank, ShardedFactors
from dynlora_fn.bases._base import PendingFold, as_base
from dynlora_fn.bases._sharded_factors import gather_factors


def rank_with_pending(param: LowRank) -> int:
    """Return the rank of the factors that `with_pending` returns."""
    if isinstance(param.base, Tensor):
        return param.factors.b.shape[-1]
    pending = sum([fold.factors.b.shape[-1] for fold in as_base(param.base).pending_folds])
    return param.factors.b.shape[-1] + pending


def with_pending(param: LowRank, dtype: torch.dtype | None = None) -> LowRank:
    """Return the same weight with its pending folds as additional slots.

    Factors with additional slots have an alpha of 1. Sharded factors are gathered. In that case this is collective:
    call it on every process.

    Args:
        param: The weight.
        dtype: The dtype of factors with additional slots. Pass float32 or wider to avoid rounding. Default None means
            the dtype of the factors.
    """
    factors = param.factors
    if isinstance(factors, ShardedFactors):
        return param._replace(factors=gather_factors(factors))
    if isinstance(param.base, Tensor):
        return param
    base = as_base(param.base)
    if not base.pending_folds:
        return param
    b, a = (side.to(dtype or side.dtype) for side in (factors.b, factors.a))
    b = torch.cat([b, *[_left(fold, param.divisor, b.dtype) for fold in base.pending_folds]], -1)
    a = torch.cat([a, *[fold.factors.a.to(a.dtype) for fold in base.pending_folds]], -2)
    return LowRank(base.folded, Factors(b * (b.shape[-1] / param.divisor), a), param.seed)


def _left(fold: PendingFold, divisor: float, dtype: torch.dtype) -> Tensor:
    """Return the left factor of a pending fold, rescaled to another divisor."""
    left = fold.factors.b.to(dtype)
    return left if fold.divisor == divisor else left * (divisor / fold.divisor)
