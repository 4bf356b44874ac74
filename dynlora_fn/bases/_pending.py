"""Treat the pending folds of a weight as additional slots of its factors."""

from typing import NamedTuple

import torch

from dynlora_fn._core._types import Factors, LowRank, ShardedFactors
from dynlora_fn.bases._sharded_factors import gather_factors
from dynlora_fn.bases._types import Deferred, FoldedBase


class BaseAndFactors(NamedTuple):
    """A weight without pending folds, ``base + b @ a / rank``.

    `rank` is the rank of these factors.
    """

    base: FoldedBase
    factors: Factors


def without_pending(param: LowRank) -> FoldedBase:
    """Return the base without its pending folds."""
    return param.base.base if isinstance(param.base, Deferred) else param.base


def rank_with_pending(param: LowRank) -> int:
    """Return the rank of the factors that `with_pending` returns."""
    pending = param.base.pending.b.shape[-1] if isinstance(param.base, Deferred) else 0
    return param.factors.b.shape[-1] + pending


def with_pending(param: LowRank) -> BaseAndFactors:
    """Return the weight with its pending folds as additional slots.

    Gradients do not reach the additional slots.

    Sharded factors are gathered. Collective in that case: call it on every process.
    """
    base, factors = param.base, param.factors
    if isinstance(factors, ShardedFactors):
        return BaseAndFactors(base, gather_factors(factors))
    if not isinstance(base, Deferred):
        return BaseAndFactors(base, factors)
    b, a = factors
    pending_b, pending_a = (leaf.detach() for leaf in base.pending)
    b, a = torch.cat([b, pending_b.to(b.dtype)], -1), torch.cat([a, pending_a.to(a.dtype)], -2)
    return BaseAndFactors(base.base, Factors(b * (b.shape[-1] / factors.b.shape[-1]), a))
