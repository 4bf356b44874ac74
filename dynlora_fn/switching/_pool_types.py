"""Pools of candidates, and checks that plans and outgoing vectors fit them."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dynlora_fn._core._check import check_by_name, described
from dynlora_fn._core._check_plan import check_fits, check_plan
from dynlora_fn.switching._planned import check_vectors, check_vectors_by_name


class SidePool(NamedTuple):
    """The candidates of one side of a weight."""

    vectors: Float[Tensor, "*stack size n"]  # one vector in each row; the row of a vector in a slot is out of date
    held: Int[Tensor, "*stack rank"]  # the row to which the vector in each slot returns


class Pool(NamedTuple):
    """The candidates of one weight, min(out, in) on each side, in use or idle."""

    b: SidePool  # vectors (*stack, size, out)
    a: SidePool  # vectors (*stack, size, in)


def check_pools(pool: Any, plan: Any) -> None:
    """Raise if a plan does not fit its pool.

    Plan and pool may also be dicts by name.

    Raises:
        TypeError: If a type or dtype is wrong.
        ValueError: If a name, shape or slot does not fit, or a plan has no data.
    """
    if not isinstance(pool, Mapping):
        _check_pool("param", pool, plan)
        return
    check_by_name("pool", pool, of="pools")
    check_by_name("plan", plan, of="plans")
    if missing := sorted(set(plan) - set(pool)):
        raise ValueError(f"`pool` has no pool for the planned {missing}; pass the pools of the same parameters")
    for name, param_plan in plan.items():
        _check_pool(name, pool[name], param_plan)


def check_outgoing(outgoing: Any, pool: Any, plan: Any) -> None:
    """Raise if outgoing vectors do not fit a plan and a pool.

    `check_pools` has already compared the plan with the pool.
    """
    if not isinstance(pool, Mapping):
        _check_outgoing("param", outgoing, pool, plan)
        return
    check_vectors_by_name("outgoing", outgoing, plan)
    for name, param_plan in plan.items():
        _check_outgoing(name, outgoing[name], pool[name], param_plan)


def _check_pool(name: str, pool: Any, plan: Any) -> None:
    if not isinstance(pool, Pool):
        raise TypeError(f"`pool` is {described(pool)} for {name!r}; pass a Pool, or a dict of them by name")
    check_plan("plan", name, plan)
    for side_name, side in (("b", pool.b), ("a", pool.a)):
        if not _is_side_pool(side):
            raise TypeError(
                f"`pool` has {described(side)} as side {side_name} of {name!r}; pass the pool of `init_pool`"
            )
    _check_data("plan", name, [*plan.b, *plan.a], pool)
    held = pool.a.held
    check_fits("plan", name, plan, tuple(held.shape[:-1]), held.shape[-1])


def _is_side_pool(side: Any) -> bool:
    return (
        isinstance(side, SidePool)
        and isinstance(side.vectors, Tensor)
        and isinstance(side.held, Tensor)
        and side.vectors.is_floating_point()
        and side.held.dtype == torch.int64
        and side.vectors.ndim == side.held.ndim + 1 >= 2
    )


def _check_outgoing(name: str, outgoing: Any, pool: Pool, plan: Any) -> None:
    check_vectors("outgoing", name, outgoing)
    sides = (("b", outgoing.b.mT, pool.b, plan.b), ("a", outgoing.a, pool.a, plan.a))
    for side, vectors, side_pool, side_plan in sides:
        *stack, _, length = side_pool.vectors.shape
        wanted = (*stack, side_plan.slots.shape[-1], length)
        if vectors.shape != wanted:
            raise ValueError(
                f"`outgoing.{side}` of {name!r}, with one vector in each row, has shape {tuple(vectors.shape)}, but the"
                f" plan needs {wanted}; pass what `switch` returned"
            )
    _check_data("outgoing", name, outgoing, pool)


def _check_data(argument: str, name: str, tensors: Iterable[Tensor], pool: Pool) -> None:
    """Raise ValueError if tensors have no data, but the pool has.

    Other devices may differ, since a pool may be in host memory.
    """
    if any(tensor.is_meta for tensor in tensors) and not pool.a.vectors.is_meta:
        raise ValueError(
            f"`{argument}` is on meta for {name!r}, but `pool` on {pool.a.vectors.device}; pass tensors with data"
        )
