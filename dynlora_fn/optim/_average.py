"""`average`: average weights over the steps of a run, across switches."""

from collections.abc import Mapping
from typing import overload

import torch
from torch import Tensor

from dynlora_fn._core._check import check_rate
from dynlora_fn._core._check_trees import check_alpha, check_one_or_more
from dynlora_fn._core._dtypes import widest
from dynlora_fn._core._tree import tensor_of
from dynlora_fn._core._types import FrozenTensor, LowRank, OneSidedFactors, Param, Params
from dynlora_fn.bases._base import as_base
from dynlora_fn.bases._fold import fold
from dynlora_fn.optim._transform import Rate, check_is_floating


@overload
def average(averaged: LowRank, params: LowRank, *, decay: Rate) -> LowRank: ...
@overload
def average(averaged: Tensor, params: Param, *, decay: Rate) -> Tensor: ...
@overload
def average(averaged: Params, params: Params, *, decay: Rate) -> dict[str, Param]: ...
def average(averaged: Param | Params, params: Param | Params, *, decay: Rate) -> Param | dict[str, Param]:
    """Update an exponential average of weights.

    The weight of the result is ``decay * averaged + (1 - decay) * params``, for all factors and bases. If vectors are
    switched, averaging only the factors would give another model, because old vectors belong to an old base.

    Factors and bases are averaged separately. The product of averages is not the average of products, so the difference
    is folded into the base::

        b = decay * averaged.b + (1 - decay) * params.b,    a in the same way
        base = decay * averaged.base + (1 - decay) * params.base
               + decay * (1 - decay) * (averaged.b - params.b) @ (averaged.a - params.a) / divisor

    The divisor is ``rank / alpha``. If only `b` is trained, the average takes `a` from the run, so that its rows stay
    orthogonal, and ``decay * averaged.b @ (averaged.a - params.a) / divisor`` is folded.

    Call ``switch(averaged, plan)`` with every plan of the run. Then corresponding slots contain versions of the same
    vector, and the folded difference is small. Without this call the result is right too, but the folded difference is
    as large as the product of the factors.

    Cost: two passes over each base, and ``2 * rank * out * in`` FLOPs. A quantized base is encoded again.

    Args:
        averaged: The average so far. It starts as a copy of the parameters of the run. Low-rank weights may be replaced
            by full-rank tensors, as `materialize` returns them.
        params: The parameters of the run.
        decay: The weight of the old average, from 0 to 1: a number or a 0-d tensor. With a tensor, a new value does not
            recompile a compiled step.

    Returns:
        The new average, with the structure, shapes and dtypes of `averaged`. A `FrozenTensor` is returned unchanged.
        Buffers that the model writes, such as running statistics, are only in `params`.

    Raises:
        TypeError: If `decay` is not a real number, or a parameter is neither a `LowRank` nor a tensor.
        ValueError: If `decay` is out of range, or names, shapes, ranks, alphas or devices differ. If `averaged` is
            low-rank or frozen where `params` has a trained tensor. If factors are sharded. If a tensor of `averaged` is
            not floating, such as a counter.
        NotImplementedError: If `averaged` is quantized, and the base or its change requires a gradient or has a
            tangent.

    Numerics: Sums are computed in float32 or a wider dtype, and every tensor of the average is rounded once to its
        dtype. An average changes by ``1 - decay`` of a difference, which may be less than the precision of bfloat16 or
        of a quantized base. Then it does not change at all, so use an average in float32: convert it, or average
        `materialize(params)`.

    Example:
        >>> import torch
        >>> from dynlora_fn import init, materialize
        >>> start = init({"w": torch.zeros(6, 4)}, rank=2, seed=0, targets=["w"])
        >>> later = init({"w": torch.ones(6, 4)}, rank=2, seed=1, targets=["w"])  # other vectors
        >>> averaged = average(start, later, decay=0.75)
        >>> torch.allclose(materialize(averaged)["w"], torch.full((6, 4), 0.25), atol=1e-6)
        True
    """
    decay = check_rate("decay", decay, most=1)
    check_one_or_more("averaged", averaged, or_tensor=True)
    check_one_or_more("params", params, or_tensor=True)
    if not isinstance(averaged, Mapping):
        if isinstance(params, Mapping):
            raise ValueError("`averaged` is one parameter, but `params` is a dict; pass two dicts or two parameters")
        return _average("param", averaged, params, decay)
    if not isinstance(params, Mapping):
        raise ValueError("`averaged` is a dict, but `params` is one parameter; pass two dicts or two parameters")
    if averaged.keys() != params.keys():
        other = ", ".join(sorted(averaged.keys() ^ params.keys())[:4])
        raise ValueError(
            f"`averaged` and `params` must have the same names, but only one has: {other}; average the same parameters"
        )
    return {name: _average(name, old, params[name], decay) for name, old in averaged.items()}


def _average(name: str, averaged: Param, param: Param, decay: Rate) -> Param:
    _check(name, averaged, param)
    if isinstance(param, FrozenTensor):
        return averaged
    if isinstance(averaged, LowRank) and isinstance(param, LowRank):
        return _average_factors(name, averaged, param, decay)
    new = _dense(param) if isinstance(param, LowRank) else param
    return _moved(averaged, new, decay)  # type: ignore[arg-type]


def _average_factors(name: str, averaged: LowRank, param: LowRank, decay: Rate) -> LowRank:
    old, new_factors = averaged.factors, param.factors
    old_base, new_base = as_base(averaged.base), as_base(param.base)
    wide = widest(*(side.dtype for side in (*old[:2], *new_factors[:2])), old_base.sum_dtype, new_base.sum_dtype)
    share = _share(decay, wide)
    if isinstance(old, OneSidedFactors):
        return _average_one_side(name, averaged, param, decay, wide)
    step_b, step_a = (new.to(wide) - side.to(wide) for new, side in ((new_factors.b, old.b), (new_factors.a, old.a)))
    change = share * (new_base.exact(wide) - old_base.exact(wide))
    change = fold(change, share * (1 - share) * step_b, step_a, divisor=averaged.divisor)
    factors = old._replace(b=_moved(old.b, new_factors.b, decay), a=_moved(old.a, new_factors.a, decay))
    return averaged._replace(base=old_base.add(change, name=name), factors=factors)


def _average_one_side(name: str, averaged: LowRank, param: LowRank, decay: Rate, wide: torch.dtype) -> LowRank:
    """Return the average with `a` of the run, whose rows are orthogonal."""
    old, new, share = averaged.factors, param.factors, _share(decay, wide)
    old_base, new_base = as_base(averaged.base), as_base(param.base)
    change = share * (new_base.exact(wide) - old_base.exact(wide))
    left, right = (1 - share) * old.b.to(wide), old.a.to(wide) - new.a.to(wide)
    change = fold(change, left, right, divisor=averaged.divisor)
    a = new.a.to(old.a.dtype, copy=True)  # a donated state would overwrite the rows of the run
    factors = old._replace(b=_moved(old.b, new.b, decay), a=a)
    return averaged._replace(base=old_base.add(change, name=name), factors=factors)


def _dense(param: LowRank) -> Tensor:
    """Return the exact dense weight, including the residual of its base."""
    b, a = param.factors.b, param.factors.a
    base = as_base(param.base)
    return fold(base.exact(widest(b.dtype, a.dtype, base.sum_dtype)), b, a, divisor=param.divisor)


def _moved(old: Tensor, new: Tensor, decay: Rate) -> Tensor:
    """Return the average of two tensors. If they are equal, it keeps every bit."""
    wide = widest(old.dtype, new.dtype)
    old_wide = old.to(wide)
    return (old_wide + _share(decay, wide) * (new.to(wide) - old_wide)).to(old.dtype)


def _share(decay: Rate, dtype: torch.dtype) -> Rate:
    """Return ``1 - decay``, the weight of the new parameters in the average.

    It is small, so it is rounded after the subtraction.
    """
    return (1 - decay.to(widest(decay.dtype, dtype))).to(dtype) if isinstance(decay, Tensor) else 1 - decay


def _check(name: str, averaged: Param, param: Param) -> None:
    if averaged.shape != param.shape:
        raise ValueError(
            f"`averaged` has shape {tuple(averaged.shape)} for {name!r}, but `params` has {tuple(param.shape)};"
            " pass an average that started as a copy of the parameters of the run"
        )
    devices = [
        value.factors.b.device if isinstance(value, LowRank) else tensor_of(value).device for value in (averaged, param)
    ]
    if devices[0] != devices[1] and not isinstance(param, FrozenTensor):
        raise ValueError(f"`averaged` has {name!r} on {devices[0]}, but `params` on {devices[1]}; move one of them")
    for argument, value in (("averaged", averaged), ("params", param)):
        if isinstance(value, LowRank) and value.factor_sharding:
            raise ValueError(f"`{argument}` has sharded factors for {name!r}; call `unshard` first")
    if isinstance(param, FrozenTensor):
        return
    if isinstance(averaged, FrozenTensor):
        raise ValueError(
            f"`averaged` is frozen for {name!r}, but `params` trains it; pass `materialize(averaged)`, or train both"
        )
    if not isinstance(averaged, LowRank):
        check_is_floating("averaged", name, averaged)
        return
    if not isinstance(param, LowRank):
        raise ValueError(f"`averaged` is low-rank for {name!r}, but `params` is a tensor; pass `materialize(averaged)`")
    check_alpha("averaged", name, averaged.factors, "params", param.factors)
    if isinstance(averaged.factors, OneSidedFactors) != isinstance(param.factors, OneSidedFactors):
        raise ValueError(
            f"`averaged` has {type(averaged.factors).__name__} for {name!r}, but `params` has"
            f" {type(param.factors).__name__}; pass an average that started as a copy of the parameters of the run"
        )
    ranks = averaged.factors.b.shape[-1], param.factors.b.shape[-1]
    if ranks[0] != ranks[1]:
        raise ValueError(
            f"`averaged` has rank {ranks[0]} for {name!r}, but `params` has rank {ranks[1]}; call `resize` on both"
        )
