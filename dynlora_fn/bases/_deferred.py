"""Folds that wait, so that a base is quantized anew less often."""

from typing import overload

from dynlora_fn._core._types import Factors, LowRank, Param, Params
from dynlora_fn.bases._base import fold_base
from dynlora_fn.bases._types import Deferred


@overload
def defer(params: LowRank, *, vectors: int) -> LowRank: ...
@overload
def defer(params: Params, *, vectors: int) -> dict[str, Param]: ...
def defer(params: LowRank | Params, *, vectors: int) -> LowRank | dict[str, Param]:
    """The same weights whose folds wait until `fold_pending`: `switch` keeps the differences as vectors.

    ``weight = base + (pending.b @ pending.a + b @ a) / rank``. The forward and backward pass take them along as that
    many more slots, which cost as much as trained ones. Where more come than there is room for, the oldest are folded,
    so that nothing is lost: with room for n switches, ``fold_pending`` every n switches is all the folding there is.

    Args:
        params: one weight, or weights by name, of any kind of base.
        vectors: that can wait; a switch brings one for each entry of its plan, of both sides.

    Numerics: differences wait in the factors' dtype: exact in float32 or wider, and rounded to it in bfloat16.

    Example:
        >>> from torch import nn
        >>> import dynlora_fn as dl
        >>> params = dl.init(nn.Linear(64, 32), rank=4, seed=0, targets=["weight"], base="int8")
        >>> dl.bases.defer(params, vectors=8)["weight"].base.pending.b.shape
        torch.Size([32, 8])
    """
    if vectors < 1:
        raise ValueError(f"`vectors` must be at least 1, got {vectors}")
    if isinstance(params, LowRank):
        return _defer("param", params, vectors)
    return {
        name: _defer(name, param, vectors) if isinstance(param, LowRank) else param for name, param in params.items()
    }


def _defer(name: str, param: LowRank, vectors: int) -> LowRank:
    base, (b, a) = param.base, param.factors
    if isinstance(base, Deferred):
        raise ValueError(f"`params` must not be deferred already, got {name!r}, which is")
    if param.factor_sharding:
        raise ValueError(f"`params` must have whole factors to be deferred, got {name!r} with sharded ones")
    shape = param.shape
    pending = Factors(b.new_zeros((*shape[:-1], vectors)), a.new_zeros((*shape[:-2], vectors, shape[-1])))
    return param._replace(base=Deferred(base, pending))


@overload
def fold_pending(params: LowRank) -> LowRank: ...
@overload
def fold_pending(params: Params) -> dict[str, Param]: ...
def fold_pending(params: LowRank | Params) -> LowRank | dict[str, Param]:
    """The same weights with what waits folded into their bases, which wait for the next; see `defer`.

    Args:
        params: one weight, or weights by name; those that are not deferred stay as they are.

    Raises:
        ValueError: if a quantized weight is not finite; it names the weight.
    """
    if isinstance(params, LowRank):
        return _fold("param", params)
    return {name: _fold(name, param) if isinstance(param, LowRank) else param for name, param in params.items()}


def _fold(name: str, param: LowRank) -> LowRank:
    if not isinstance(param.base, Deferred):
        return param
    held, (b, a) = param.base
    folded = fold_base(held, b, a, rank=param.factors.b.shape[-1], name=name)
    return param._replace(base=Deferred(folded, Factors(b.new_zeros(b.shape), a.new_zeros(a.shape))))
