"""Hypothesis strategies for every valid value, edges included.

Only integers and choices are drawn, and every tensor is a function of them (see `values`): so that examples can be
repeated, shrink to small ones, and are shown as the call that makes them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor

from dynlora_fn._core._types import LowRank, Param, Params, Plan, SidePlan, Trainable
from dynlora_fn.optim._transform import Transform
from dynlora_fn.switching._schedule import Schedule, every, never, switchlora
from dynlora_fn.testing._values import STORAGES, Shape, Storage, fits, low_rank, normal, optimizer_state, side_plan

Value = TypeVar("Value")

seeds = st.integers(0, 2**31 - 1)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])
stacks: st.SearchStrategy[tuple[int, ...]] = st.sampled_from([(), (1,), (3,), (2, 3)])


@st.composite
def shapes(draw: st.DrawFn, *, largest: int = 8) -> Shape:
    """Matrices of any proportion with any rank that fits them, 1 and min(out, in) among them.

    Args:
        largest: of the numbers along an axis.
    """
    if largest < 1:
        raise ValueError(f"`largest` must be at least 1, got {largest}")
    out_features, in_features = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    least = min(out_features, in_features)
    return Shape(out_features, in_features, draw(st.one_of(st.just(1), st.just(least), st.integers(1, least))))


any_shapes = shapes()
_BLOCKS = {"nf4": (8, 8), "nvfp4": (1, 16), "mxfp4": (1, 32)}


@st.composite
def low_rank_params(
    draw: st.DrawFn,
    *,
    shapes: st.SearchStrategy[Shape] | None = None,
    stacks: st.SearchStrategy[tuple[int, ...]] = stacks,
    storages: Sequence[Storage] = STORAGES,
    factor_dtypes: st.SearchStrategy[torch.dtype] = dtypes,
    deferred: bool | None = None,
) -> LowRank:
    """Weights with bases of every precision, in codes with every residual and without, and with folds that wait.

    Args:
        shapes, stacks, factor_dtypes: of the weights.
        storages: of the bases; `PLAIN` are those that `merge` and `switch` leave in one tensor.
        deferred: whether folds wait, with room for those of any plan; both unless given.
    """
    if not storages:
        raise ValueError("`storages` must name at least one, got none")
    if shapes is None:
        storage = draw(st.sampled_from(storages))
        shape = _fitting(storage, draw(any_shapes))
    else:
        shape = draw(shapes)
        fitting = [storage for storage in storages if fits(storage, shape)]
        if not fitting:
            raise ValueError(f"`storages` must hold one whose blocks divide {shape}, got {storages}")
        storage = draw(st.sampled_from(fitting))
    is_deferred = draw(st.booleans()) if deferred is None else deferred
    return _made(
        draw,
        low_rank,
        shape,
        draw(stacks),
        draw(seeds),
        factor_dtype=draw(factor_dtypes),
        storage=storage,
        waiting=2 * shape.rank if is_deferred else 0,
    )


def _fitting(storage: Storage, shape: Shape) -> Shape:
    """A shape that the format's blocks divide. Drawn like any other, so that an example can go over to a format without
    blocks as it is made smaller."""
    if storage.kind not in _BLOCKS:
        return shape
    out, in_ = (block * (1 + (size - 1) % 3) for block, size in zip(_BLOCKS[storage.kind], shape[:2], strict=True))
    return Shape(out, in_, min(shape.rank, out, in_))


def plans(params: LowRank | Params) -> st.SearchStrategy[Any]:
    """Any plan for one weight, or by name for some, none or all of the low-rank ones.

    None, some or all of the slots of each side, whole or in part inactive, one plan for the whole stack or one for each
    member, the same slots on both sides or not, frozen for no, some or the usual number of updates.
    """
    return _plans_by_name(params) if isinstance(params, Mapping) else _plans(params)


@st.composite
def _plans_by_name(draw: st.DrawFn, params: Params) -> dict[str, Plan]:
    return {
        name: draw(_plans(param))
        for name, param in params.items()
        if isinstance(param, LowRank) and draw(st.booleans())
    }


@st.composite
def _plans(draw: st.DrawFn, param: LowRank) -> Plan:
    rank, stack = param.factors.a.shape[-2], tuple(param.seed.shape)
    b = draw(_side_plans(rank, stack))
    a = draw(st.one_of(st.just(b), _side_plans(rank, stack)))
    frozen_for = torch.tensor(draw(st.integers(0, 6)), dtype=torch.int32)
    return _made(draw, Plan, b=b, a=a, frozen_for=frozen_for)


@st.composite
def _side_plans(draw: st.DrawFn, rank: int, stack: tuple[int, ...]) -> SidePlan:
    count = draw(st.one_of(st.just(0), st.just(rank), st.integers(0, rank)))
    own_stack, share = draw(st.sampled_from([(), stack])), draw(st.sampled_from([1.0, 0.5, 0.0]))
    return _made(draw, side_plan, rank, count, own_stack, draw(seeds), share_active=share)


@st.composite
def schedules(draw: st.DrawFn, *, kinds: Sequence[str] = ("rate", "count", "never", "switchlora")) -> Schedule:
    """Schedules that hold for weights of any rank: with a rate, down to the shortest interval that the freeze allows,
    with a count, the paper's, and none.

    Args:
        kinds: of schedules, some of "rate", "count", "never" and "switchlora".
    """
    if unknown := set(kinds) - {"rate", "count", "never", "switchlora"}:
        raise ValueError(f"`kinds` must be some of rate, count, never and switchlora, got {sorted(unknown)}")
    kind = draw(st.sampled_from(kinds))
    steps, freeze = draw(st.sampled_from([1, 1, 2, 5])), draw(st.integers(0, 6))
    least = max(2 * steps * math.ceil(freeze / steps), steps)
    if kind == "never":
        return never()
    if kind == "count":  # with a freeze, how many fit depends on the rank
        return every(steps, draw(st.one_of(st.just("all"), st.integers(1, 8))), from_pool=draw(st.booleans()))
    if kind == "switchlora":
        return switchlora(
            draw(st.integers(1, 10**5)), interval=draw(st.integers(least, 60)), freeze=freeze, every=steps
        )
    interval = draw(st.one_of(st.just(least), st.integers(least, 60), st.integers(4 * least, 240).map(lambda n: n / 4)))
    return Schedule(interval=interval, decay=draw(st.sampled_from([1.0, 0.9999, 0.99])), every=steps, freeze=freeze)


@st.composite
def trees(draw: st.DrawFn, *, weights: st.SearchStrategy[LowRank] | None = None, largest: int = 3) -> dict[str, Param]:
    """Parameters by name: low-rank ones, stacked ones under names with a star for each axis, and full-rank tensors.

    Args:
        weights: the low-rank ones; `low_rank_params()` unless given.
        largest: number of each kind.
    """
    if largest < 0:
        raise ValueError(f"`largest` must not be negative, got {largest}")
    weights = low_rank_params() if weights is None else weights
    params: dict[str, Param] = {}
    for number, weight in enumerate(draw(st.lists(weights, max_size=largest))):
        params[f"{'blocks.' + '*.' * weight.seed.ndim if weight.seed.ndim else ''}w{number}.weight"] = weight
    for number in range(draw(st.integers(0, largest))):
        shape = draw(st.sampled_from([(), (1,), (5,), (3, 4)]))
        params[f"full{number}"] = _made(draw, normal, draw(seeds), *shape, dtype=draw(dtypes))
    return params


@st.composite
def optimizer_states(
    draw: st.DrawFn, params: Params | Trainable, *, optimizer: Transform | None = None, most_steps: int = 3
) -> Any:
    """States of an optimizer before its first update and after some, with vectors that are frozen and others.

    Args:
        params: all of them, or what is trained.
        optimizer: `adamw()` unless given.
        most_steps: updates that lie behind a state.
    """
    if most_steps < 0:
        raise ValueError(f"`most_steps` must not be negative, got {most_steps}")
    steps = draw(st.sampled_from([most_steps, 0, *range(1, most_steps)]))
    return _made(draw, optimizer_state, params, steps=steps, seed=draw(seeds), optimizer=optimizer)


@st.composite
def batches(
    draw: st.DrawFn, features: int, *, largest: int = 8, dtypes: st.SearchStrategy[torch.dtype] = dtypes
) -> Tensor:
    """Inputs of a layer, ``(*batch, features)``: one token or some, with no, one or two leading axes.

    Args:
        features: of the layer's input.
        largest: number along a leading axis.
        dtypes: of the inputs.
    """
    if features < 1 or largest < 1:
        raise ValueError(f"`features` and `largest` must be at least 1, got {features} and {largest}")
    shape = draw(st.lists(st.integers(1, largest), max_size=2))
    return _made(draw, normal, draw(seeds), *shape, features, dtype=draw(dtypes))


def _made(draw: st.DrawFn, make: Callable[..., Value], *args: Any, **settings: Any) -> Value:
    """What the call returns, known to hypothesis by the call: that is what a failing example shows."""
    given = [st.just(value) for value in args]
    return draw(st.builds(make, *given, **{name: st.just(value) for name, value in settings.items()}))
