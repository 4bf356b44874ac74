"""Stored candidates, as in SwitchLoRA: vectors that go out return to the pool with their trained values.

A layer over `switch`'s `incoming` and `outgoing`. A pool holds min(out, in) * (out + in) numbers for a weight, 1 to 2
times the weight, so that it lies in host memory by default; a step takes from it and gives back a few vectors.
"""

from collections.abc import Mapping
from typing import NamedTuple, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dynlora_fn._core._types import Factors, LowRank, Params, Plan, Plans, SidePlan
from dynlora_fn.switching._switch import take_rows
from dynlora_fn.switching._weight import BasisSlice, basis_vectors


class SidePool(NamedTuple):
    """Candidates of one side of a weight."""

    vectors: Float[Tensor, "*stack size n"]  # one a row; the rows of vectors in use are stale
    held: Int[Tensor, "*stack rank"]  # which row the vector in each slot belongs to


class Pool(NamedTuple):
    """Candidates of one weight, min(out, in) a side, the ones in use among them."""

    b: SidePool  # vectors (*stack, size, out)
    a: SidePool  # vectors (*stack, size, in)


def init_pool(params: Params, *, device: torch.device | str = "cpu") -> dict[str, Pool]:
    """A pool for every low-rank parameter: the first min(out, in) vectors of its basis, those it starts with included.

    Args:
        params: as `init` made them.
        device: that the pools lie on.
    """
    return {name: _init_pool(param, device) for name, param in params.items() if isinstance(param, LowRank)}


def _init_pool(param: LowRank, device: torch.device | str) -> Pool:
    if param.factor_sharding:
        raise ValueError("`params` must have whole factors to be given a pool, got sharded ones")
    shape, rank = param.shape[-2:], param.factors.a.shape[-2]
    rows = torch.arange(min(shape), device=device)
    seed, dtype = param.seed.to(device), param.factors.a.dtype
    (vectors,) = basis_vectors([BasisSlice(seed, rows, rows, shape, rank, "switchlora", dtype)])
    slots = rows[:rank].expand(*seed.shape, rank)
    return Pool(
        b=SidePool(vectors.b.mT.contiguous(), (slots - rank // 2) % rank),
        a=SidePool(vectors.a, slots.clone()),
    )


@overload
def draw(pool: Pool, plan: Plan) -> Factors: ...
@overload
def draw(pool: Mapping[str, Pool], plan: Plans) -> dict[str, Factors]: ...
def draw(pool: Pool | Mapping[str, Pool], plan: Plan | Plans) -> Factors | dict[str, Factors]:
    """The vectors that a plan takes from the pool, on the plan's device: `switch`'s `incoming`.

    Args:
        pool: of one weight, or by name.
        plan: of one weight, or by name. It must take rows that are idle: `Schedule` does, for it takes the rows in turn
            and never more than are idle.

    Raises:
        ValueError: if the plan could take more vectors of a side than are idle.
    """
    if isinstance(pool, Pool):
        assert isinstance(plan, Plan)
        return Factors(b=_draw(pool.b, plan.b).mT, a=_draw(pool.a, plan.a))
    assert isinstance(plan, Mapping)
    return {name: draw(pool[name], own) for name, own in plan.items()}


def _draw(pool: SidePool, plan: SidePlan) -> Tensor:
    size, idle, count = pool.vectors.shape[-2], pool.vectors.shape[-2] - pool.held.shape[-1], plan.slots.shape[-1]
    if count > idle:
        raise ValueError(f"`plan` must not take more vectors than the {idle} idle ones of {size}, got {count}")
    return take_rows(pool.vectors, plan.indices.to(pool.held.device) % size).to(plan.indices.device)


@overload
def put_back(pool: Pool, plan: Plan, outgoing: Factors, *, donate: bool = False) -> Pool: ...
@overload
def put_back(
    pool: Mapping[str, Pool], plan: Plans, outgoing: Mapping[str, Factors], *, donate: bool = False
) -> dict[str, Pool]: ...
def put_back(
    pool: Pool | Mapping[str, Pool],
    plan: Plan | Plans,
    outgoing: Factors | Mapping[str, Factors],
    *,
    donate: bool = False,
) -> Pool | dict[str, Pool]:
    """The pool after a switch: outgoing vectors lie in the rows they were once taken from.

    Args:
        pool: of one weight, or by name, as it was drawn from.
        plan: the one that was drawn and switched by.
        outgoing: what `switch` returned.
        donate: write into the memory of `pool`, which must not be used again, instead of copying all of it.
    """
    if isinstance(pool, Pool):
        assert isinstance(plan, Plan)
        assert isinstance(outgoing, Factors)
        return Pool(b=_put_back(pool.b, plan.b, outgoing.b.mT, donate), a=_put_back(pool.a, plan.a, outgoing.a, donate))
    assert isinstance(plan, Mapping)
    assert isinstance(outgoing, Mapping)
    new = {name: put_back(pool[name], own, outgoing[name], donate=donate) for name, own in plan.items()}
    return {**pool, **new}


def _put_back(pool: SidePool, plan: SidePlan, outgoing: Tensor, donate: bool) -> SidePool:
    vectors, held = pool if donate else (pool.vectors.clone(), pool.held.clone())
    slots, indices, active = (leaf.to(held.device).expand(*held.shape[:-1], -1) for leaf in plan)
    if not slots.shape[-1]:
        return SidePool(vectors, held)
    rows = held.gather(-1, slots)
    new_rows = torch.where(active, indices % vectors.shape[-2], rows)
    new_vectors = torch.where(active[..., None], outgoing.to(vectors), take_rows(vectors, rows))
    # An entry that is not active may name a row that an active one writes: it repeats the first active entry instead.
    source = torch.where(
        active, torch.arange(active.shape[-1], device=held.device), active.int().argmax(-1, keepdim=True)
    )
    rows, slots, new_rows = (leaf.gather(-1, source) for leaf in (rows, slots, new_rows))
    vectors.scatter_(-2, rows[..., None].expand(*rows.shape, vectors.shape[-1]), take_rows(new_vectors, source))
    held.scatter_(-1, slots, new_rows)
    return SidePool(vectors, held)
