"""A weight with its pending folds among its factors."""

from dataclasses import replace
from typing import NamedTuple

import torch

from dynlora_fn._core._types import Factors, LowRank
from dynlora_fn.bases._sharded_factors import gather_factors
from dynlora_fn.bases._types import Deferred, FoldedBase, Sharded


class BaseAndFactors(NamedTuple):
    """A weight, ``base + b @ a / rank``, in which nothing waits: the rank is that of its factors."""

    base: FoldedBase
    factors: Factors


def without_pending(param: LowRank) -> FoldedBase:
    """Its base, without what waits."""
    return param.base.base if isinstance(param.base, Deferred) else param.base


def rank_with_pending(param: LowRank) -> int:
    """Of its factors."""
    waiting = param.base.pending.b.shape[-1] if isinstance(param.base, Deferred) else 0
    return param.factors.b.shape[-1] + waiting


def with_pending(param: LowRank) -> BaseAndFactors:
    """The same weight with what waits to be folded among its factors, as further slots of which none is trained.
    Sharded factors are gathered."""
    base, (b, a) = param.base, param.factors
    if sharding := param.factor_sharding:
        assert isinstance(base, Sharded)
        held = base._replace(sharding=replace(sharding, columns=None))
        return BaseAndFactors(held, gather_factors(param.factors, sharding))
    if not isinstance(base, Deferred):
        return BaseAndFactors(base, param.factors)
    waiting_b, waiting_a = (leaf.detach() for leaf in base.pending)
    b, a = torch.cat([b, waiting_b.to(b.dtype)], -1), torch.cat([a, waiting_a.to(a.dtype)], -2)
    return BaseAndFactors(base.base, Factors(b * (b.shape[-1] / param.factors.b.shape[-1]), a))
