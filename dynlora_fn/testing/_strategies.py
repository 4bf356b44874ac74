"""Hypothesis strategies for every valid value, edges included.

Only integers and choices are drawn, and every tensor is a function of them (see `_values.py`). So an example can be
repeated, shrinks to a small one, and is printed as the call that creates it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

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
    """Draw matrices of any proportion, with any rank that fits.

    The rank is often 1 or min(out, in).

    Args:
        largest: The largest size of an axis.

    Raises:
        ValueError: When an example is drawn, if `largest` is less than 1.

    Example:
        >>> shapes(largest=4).validate()
    """
    if largest < 1:
        raise ValueError(f"`largest` is {largest}; use at least 1")
    out_features, in_features = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    largest_rank = min(out_features, in_features)
    return Shape(
        out_features, in_features, draw(st.one_of(st.just(1), st.just(largest_rank), st.integers(1, largest_rank)))
    )


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
    alphas: st.SearchStrategy[float] | None = None,
    trained: Literal["both", "b"] = "both",
) -> LowRank:
    """Draw weights with bases of every precision.

    Some have a residual and pending folds.

    Args:
        shapes: A strategy for shapes. Default None draws shapes that fit the storage.
        stacks: A strategy for stack axes.
        storages: The storages of bases. With `PLAIN`, each base is one tensor.
        factor_dtypes: A strategy for dtypes of factors.
        deferred: Whether bases are deferred, with pending folds and room for the vectors of any plan. Default None
            draws both kinds.
        alphas: A strategy for alphas. Default None means 1.
        trained: Which factors are trained, "both" or only "b".

    Raises:
        ValueError: When an example is drawn, if `storages` is empty or no storage fits a shape.

    Example:
        >>> low_rank_params(deferred=False).validate()
    """
    if not storages:
        raise ValueError("`storages` is empty; pass at least one, for example `PLAIN`")
    if shapes is None:
        storage = draw(st.sampled_from(storages))
        shape = _fitting(storage, draw(any_shapes))
    else:
        shape = draw(shapes)
        fitting = [storage for storage in storages if fits(storage, shape)]
        if not fitting:
            raise ValueError(
                f"`storages` has none whose blocks divide {shape}, only {storages}; add one or draw other shapes"
            )
        storage = draw(st.sampled_from(fitting))
    is_deferred = draw(st.booleans()) if deferred is None else deferred
    return _build(
        draw,
        low_rank,
        shape,
        draw(stacks),
        draw(seeds),
        factor_dtype=draw(factor_dtypes),
        storage=storage,
        waiting=2 * shape.rank if is_deferred else 0,
        **({} if alphas is None else {"alpha": draw(alphas)}),
        **({} if trained == "both" else {"trained": trained}),
    )


def _fitting(storage: Storage, shape: Shape) -> Shape:
    """Return a shape that the blocks of the format divide.

    It is computed from any drawn shape, so shrinking can replace the format by a format without blocks.
    """
    if storage.kind not in _BLOCKS:
        return shape
    out, in_ = (block * (1 + (size - 1) % 3) for block, size in zip(_BLOCKS[storage.kind], shape[:2], strict=True))
    return Shape(out, in_, min(shape.rank, out, in_))


def plans(params: LowRank | Params) -> st.SearchStrategy[Any]:
    """Return a strategy for any plan of a weight, or of some low-rank weights by name.

    A plan names none, some or all slots of each side, and none, some or all of its entries are active. It applies to
    the whole stack or has separate entries for each member. The slots of the two sides may be equal or different. The
    plan freezes for 0 to 6 updates.

    Args:
        params: A weight, or parameters by name. By name, any subset of the low-rank weights gets a plan.

    Example:
        >>> plans(low_rank(Shape(6, 4, 2))).validate()
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
    return _build(draw, Plan, b=b, a=a, frozen_for=frozen_for)


@st.composite
def _side_plans(draw: st.DrawFn, rank: int, stack: tuple[int, ...]) -> SidePlan:
    count = draw(st.one_of(st.just(0), st.just(rank), st.integers(0, rank)))
    plan_stack, share = draw(st.sampled_from([(), stack])), draw(st.sampled_from([1.0, 0.5, 0.0]))
    return _build(draw, side_plan, rank, count, plan_stack, draw(seeds), share_active=share)


@st.composite
def schedules(draw: st.DrawFn, *, kinds: Sequence[str] = ("rate", "count", "never", "switchlora")) -> Schedule:
    """Draw schedules that are valid for weights of any rank.

    Schedules with a rate include the shortest interval that the freeze allows.

    Args:
        kinds: The kinds of schedules to draw, from "rate", "count", "never" and "switchlora" (the paper's).

    Raises:
        ValueError: When an example is drawn, if a kind is unknown.

    Example:
        >>> schedules(kinds=["rate"]).validate()
    """
    if unknown := set(kinds) - {"rate", "count", "never", "switchlora"}:
        raise ValueError(f"`kinds` has {sorted(unknown)}; use some of rate, count, never and switchlora")
    kind = draw(st.sampled_from(kinds))
    steps, freeze = draw(st.sampled_from([1, 1, 2, 5])), draw(st.integers(0, 6))
    shortest = max(2 * steps * math.ceil(freeze / steps), steps)
    if kind == "never":
        return never()
    if kind == "count":  # without a freeze, since with one the valid counts depend on the rank
        return every(steps, draw(st.one_of(st.just("all"), st.integers(1, 8))), from_pool=draw(st.booleans()))
    if kind == "switchlora":
        return switchlora(
            draw(st.integers(1, 10**5)), interval=draw(st.integers(shortest, 60)), freeze=freeze, every=steps
        )
    interval = draw(
        st.one_of(st.just(shortest), st.integers(shortest, 60), st.integers(4 * shortest, 240).map(lambda n: n / 4))
    )
    return Schedule(interval=interval, decay=draw(st.sampled_from([1.0, 0.9999, 0.99])), every=steps, freeze=freeze)


@st.composite
def trees(draw: st.DrawFn, *, weights: st.SearchStrategy[LowRank] | None = None, largest: int = 3) -> dict[str, Param]:
    """Draw low-rank, stacked and full-rank parameters by name.

    The names of stacked weights have a star for each stack axis.

    Args:
        weights: A strategy for the low-rank weights. Default None means `low_rank_params()`.
        largest: The largest number of parameters of each kind: low-rank and full-rank.

    Raises:
        ValueError: When an example is drawn, if `largest` is negative.

    Example:
        >>> trees(largest=1).validate()
    """
    if largest < 0:
        raise ValueError(f"`largest` is {largest}; use at least 0")
    weights = low_rank_params() if weights is None else weights
    params: dict[str, Param] = {}
    for index, weight in enumerate(draw(st.lists(weights, max_size=largest))):
        params[f"{'blocks.' + '*.' * weight.seed.ndim if weight.seed.ndim else ''}w{index}.weight"] = weight
    for index in range(draw(st.integers(0, largest))):
        shape = draw(st.sampled_from([(), (1,), (5,), (3, 4)]))
        params[f"full{index}"] = _build(draw, normal, draw(seeds), *shape, dtype=draw(dtypes))
    return params


@st.composite
def optimizer_states(
    draw: st.DrawFn, params: Params | Trainable, *, optimizer: Transform | None = None, most_steps: int = 3
) -> Any:
    """Draw states of an optimizer, before its first update and after some.

    Some vectors are frozen.

    Args:
        params: The parameters, or only the trainable tree.
        optimizer: The optimizer. Default None means `adamw()`.
        most_steps: The largest number of updates.

    Raises:
        ValueError: When an example is drawn, if `most_steps` is negative.

    Example:
        >>> optimizer_states({"w": low_rank(Shape(6, 4, 2))}).validate()
    """
    if most_steps < 0:
        raise ValueError(f"`most_steps` is {most_steps}; use at least 0")
    steps = draw(st.sampled_from([most_steps, 0, *range(1, most_steps)]))
    return _build(draw, optimizer_state, params, steps=steps, seed=draw(seeds), optimizer=optimizer)


@st.composite
def batches(
    draw: st.DrawFn, features: int, *, largest: int = 8, dtypes: st.SearchStrategy[torch.dtype] = dtypes
) -> Tensor:
    """Draw inputs of a layer, ``(*batch, features)``, with at most two leading axes.

    Args:
        features: The number of input features of the layer.
        largest: The largest size of a leading axis.
        dtypes: A strategy for the dtypes.

    Raises:
        ValueError: When an example is drawn, if `features` or `largest` is less than 1.

    Example:
        >>> batches(6).validate()
    """
    if features < 1 or largest < 1:
        raise ValueError(f"`features` is {features} and `largest` is {largest}; use at least 1")
    shape = draw(st.lists(st.integers(1, largest), max_size=2))
    return _build(draw, normal, draw(seeds), *shape, features, dtype=draw(dtypes))


def _build(draw: st.DrawFn, make: Callable[..., Value], *args: Any, **settings: Any) -> Value:
    """Draw the result of a call, which hypothesis prints if an example fails."""
    constants = [st.just(value) for value in args]
    return draw(st.builds(make, *constants, **{name: st.just(value) for name, value in settings.items()}))
