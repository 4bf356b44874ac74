"""Vectors replaced, the weight kept: `switch`, and the vectors that come in."""

from collections.abc import Mapping
from typing import NamedTuple, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dynlora_fn._core._collectives import gather
from dynlora_fn._core._dtypes import widest
from dynlora_fn._core._types import Factors, LowRank, Param, Params, Plan, Plans, SidePlan
from dynlora_fn.bases._base import fold_base, plain_dtype
from dynlora_fn.switching._weight import BasisSlice, Start, basis_vectors


class Switched(NamedTuple):
    """`outgoing` holds the replaced vectors, laid out as factors: `b` (*stack, out, count), `a` (*stack, count, in).
    Entries of the plan that are not active hold what stays in their slots. Of sharded factors, the share that this
    process has."""

    param: LowRank
    outgoing: Factors


class SwitchedParams(NamedTuple):
    """`outgoing` by name, as in `Switched`."""

    params: dict[str, Param]
    outgoing: dict[str, Factors]


@overload
def switch(params: LowRank, plan: Plan, *, incoming: Factors | None = None) -> Switched: ...
@overload
def switch(params: Params, plan: Plans, *, incoming: Mapping[str, Factors] | None = None) -> SwitchedParams: ...
def switch(
    params: LowRank | Params, plan: Plan | Plans, *, incoming: Factors | Mapping[str, Factors] | None = None
) -> Switched | SwitchedParams:
    """Replaces the planned vectors and folds the difference into the base: the weight stays what it is.

    Side a first, then side b with the new `a` (arXiv:2406.06564, algorithm 1)::

        base += b[:, k] (a[k] - incoming.a[k]) / rank,     a[k] = incoming.a[k]
        base += (b[:, k] - incoming.b[k]) a[k] / rank,     b[:, k] = incoming.b[k]

    in one pass over the base. Switching back with what went out restores the factors bit for bit.

    Args:
        params: one weight, or weights by name; those without a plan stay as they are.
        plan: of one weight, or by name. Where an active slot stands twice on one side, the first entry counts.
        incoming: vectors that come in, laid out as factors with `count` in place of the rank; drawn from the basis
            (`candidates`) unless given.

    Returns:
        The new parameters, and the vectors that went out.

    Raises:
        ValueError: if the plan is for a weight that is not there or not low-rank, incoming vectors do not fit, or a
            quantized weight is not finite, then in a compiled step as well; it names the weight.

    Numerics: exact but for one rounding of the base to its dtype. The differences are formed in float32 at least. A
    quantized base is quantized anew where anything changes, from its codes and residual (see `quantize`).
    """
    if isinstance(params, LowRank):
        assert isinstance(plan, Plan)
        assert not isinstance(incoming, Mapping)
        return _switch("param", params, plan, candidates(params, plan) if incoming is None else incoming)
    assert isinstance(plan, Mapping)
    assert not isinstance(incoming, Factors)
    incoming = candidates(params, plan) if incoming is None else incoming
    new, outgoing = dict(params), {}
    for name, own_plan in plan.items():
        new[name], outgoing[name] = _switch(name, _low_rank(params, name), own_plan, incoming[name])
    return SwitchedParams(new, outgoing)


@overload
def candidates(params: LowRank, plan: Plan, *, start: Start = "switchlora") -> Factors: ...
@overload
def candidates(params: Params, plan: Plans, *, start: Start = "switchlora") -> dict[str, Factors]: ...
def candidates(
    params: LowRank | Params, plan: Plan | Plans, *, start: Start = "switchlora"
) -> Factors | dict[str, Factors]:
    """The vectors that a plan names, regenerated from the basis seed: nothing is stored or sent.

    Args:
        params: one weight, or weights by name.
        plan: of one weight, or by name; its `indices` say which vectors.
        start: as in `init`; with "lora" the vectors of side b are zero.
    """
    if isinstance(params, LowRank):
        assert isinstance(plan, Plan)
        return basis_vectors([_basis_slice(params, plan, start)])[0]
    assert isinstance(plan, Mapping)
    if not plan:
        return {}
    slices = [_basis_slice(_low_rank(params, name), own, start) for name, own in plan.items()]
    return dict(zip(plan, basis_vectors(slices), strict=True))


def _basis_slice(param: LowRank, plan: Plan, start: Start) -> BasisSlice:
    shape, rank, dtype = param.shape[-2:], param.factors.a.shape[-2], param.factors.a.dtype
    return BasisSlice(param.seed, plan.b.indices, plan.a.indices, shape, rank, start, dtype)


def _low_rank(params: Params, name: str) -> LowRank:
    param = params.get(name)
    if not isinstance(param, LowRank):
        raise ValueError(
            f"`plan` must be for low-rank parameters, got one for {name!r}, which is {type(param).__name__}"
        )
    return param


def _switch(name: str, param: LowRank, plan: Plan, incoming: Factors) -> Switched:
    b, a = param.factors
    _check_incoming(name, param, plan, incoming)
    if sharding := param.factor_sharding:
        incoming = Factors(incoming.b[..., sharding.local_rows, :], incoming.a[..., sharding.as_columns.local_rows])
    wide = widest(a.dtype, plain_dtype(param.base))
    new_a = _replace(a, plan.a, incoming.a, wide)
    new_b = _replace(b.mT, plan.b, incoming.b.mT, wide)
    # One fold of both sides: the columns that meet each row of differences, and the other way about.
    left = torch.cat([take_rows(b.mT, plan.a.slots).mT.to(wide), new_b.difference.mT], dim=-1)
    right = torch.cat([new_a.difference, _rows_after(a, plan.a, incoming.a, plan.b.slots).to(wide)], dim=-2)
    if sharding:  # rows of the base are whole
        right = gather(right.mT, sharding.as_columns).mT
    base = fold_base(param.base, left, right, rank=a.shape[-2], name=name)
    factors = Factors(b=new_b.rows.mT.contiguous(), a=new_a.rows)
    return Switched(LowRank(base, factors, param.seed), Factors(b=new_b.outgoing.mT, a=new_a.outgoing))


class _Replaced(NamedTuple):
    rows: Tensor  # (*stack, rank, n), with the new vectors
    outgoing: Tensor  # (*stack, count, n)
    difference: Tensor  # (*stack, count, n), in the fold's dtype: outgoing - incoming where active, else 0


def _replace(
    rows: Float[Tensor, "*stack rank n"], plan: SidePlan, incoming: Float[Tensor, "*stack count n"], wide: torch.dtype
) -> _Replaced:
    incoming = incoming.to(rows.dtype)
    source, is_hit, is_effective = _sources(plan, rows.shape[-2])
    new = torch.where(is_hit[..., None], take_rows(incoming, source), rows) if plan.slots.shape[-1] else rows
    outgoing = take_rows(rows, plan.slots)
    difference = torch.where(is_effective[..., None], outgoing.to(wide) - incoming.to(wide), 0)
    return _Replaced(new, outgoing, difference)


def _rows_after(
    rows: Float[Tensor, "*stack rank n"],
    plan: SidePlan,
    incoming: Float[Tensor, "*stack count n"],
    index: Int[Tensor, "*#stack wanted"],
) -> Float[Tensor, "*stack wanted n"]:
    """The new vectors at `index` alone. Read out of all of them, those would have to be in memory before the optimizer
    writes them, which compiled is a copy of the factors."""
    kept = take_rows(rows, index)
    if not plan.slots.shape[-1]:
        return kept
    source, is_hit, _ = _sources(plan, rows.shape[-2])
    stack = rows.shape[:-2]
    index = index.expand(*stack, index.shape[-1])
    source, is_hit = (which.expand(*stack, which.shape[-1]).gather(-1, index) for which in (source, is_hit))
    return torch.where(is_hit[..., None], take_rows(incoming.to(rows.dtype), source), kept)


def _sources(
    plan: SidePlan, rank: int
) -> tuple[Int[Tensor, "*stack rank"], Bool[Tensor, "*stack rank"], Bool[Tensor, "*stack count"]]:
    """For each slot the first active entry that names it and whether there is one; for each entry whether it counts.

    A comparison of every slot with every entry instead of a scatter: entries that are not active collide with nothing,
    and it fuses into the write of the factor when compiled.
    """
    entries = torch.arange(plan.slots.shape[-1], device=plan.slots.device)
    slots = torch.arange(rank, device=plan.slots.device)
    names_slot = (plan.slots[..., None, :] == slots[:, None]) & plan.active[..., None, :]  # (*stack, rank, count)
    is_hit = names_slot.any(-1)
    first = torch.where(names_slot, entries, len(entries)).amin(-1) if len(entries) else is_hit.long()
    is_effective = plan.active & (first.gather(-1, plan.slots) == entries)
    return first.clamp(max=max(len(entries) - 1, 0)), is_hit, is_effective


def take_rows(
    matrix: Float[Tensor, "*stack rows n"], index: Int[Tensor, "*#stack count"]
) -> Float[Tensor, "*stack count n"]:
    """``matrix[..., index, :]``, with the same index for the whole stack or one for each member."""
    shape = (*matrix.shape[:-2], index.shape[-1], matrix.shape[-1])
    return matrix.gather(-2, index[..., None].expand(shape))


def _check_incoming(name: str, param: LowRank, plan: Plan, incoming: Factors) -> None:
    *stack, out_features, in_features = param.shape
    for side, vectors, wanted in (
        ("b", incoming.b, (*stack, out_features, plan.b.slots.shape[-1])),
        ("a", incoming.a, (*stack, plan.a.slots.shape[-1], in_features)),
    ):
        if vectors.shape != wanted:
            raise ValueError(f"`incoming.{side}` must have shape {wanted} for {name!r}, got {tuple(vectors.shape)}")
