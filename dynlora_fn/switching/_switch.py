"""Replace factor vectors without changing the weight."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dynlora_fn._core._check_trees import check_alpha
from dynlora_fn._core._collectives import gather
from dynlora_fn._core._dtypes import widest
from dynlora_fn._core._plans import remembered, share_plans
from dynlora_fn._core._types import (
    AnyFactors,
    Factors,
    LowRank,
    OneSidedFactors,
    Param,
    Params,
    Plan,
    Plans,
    ScaledFactors,
    ShardedFactors,
    SidePlan,
    alpha_of,
    divisor_of,
    has_no_constants,
)
from dynlora_fn.bases._base import as_base
from dynlora_fn.bases._refusals import refuse_attached
from dynlora_fn.switching._candidates import planned_vectors
from dynlora_fn.switching._orthonormal import check_orthogonal
from dynlora_fn.switching._planned import check_planned, low_rank


class Switched(NamedTuple):
    """A switched weight and its outgoing vectors.

    `outgoing` has the type and the layout of factors: `b` (*stack, out, count), `a` (*stack, count, in). For an
    inactive entry of the plan it contains the vector that stays in the slot.
    """

    param: LowRank
    outgoing: AnyFactors


_Weight: TypeAlias = tuple[str, LowRank, Plan, AnyFactors]  # with its name, and the vectors that enter


class SwitchedParams(NamedTuple):
    """Switched parameters and their outgoing vectors by name, as in `Switched`."""

    params: dict[str, Param]
    outgoing: dict[str, AnyFactors]


@overload
def switch(params: LowRank, plan: Plan, *, incoming: AnyFactors | None = None) -> Switched: ...
@overload
def switch(params: Params, plan: Plans, *, incoming: Mapping[str, AnyFactors] | None = None) -> SwitchedParams: ...
def switch(params: LowRank | Params, plan: Any, *, incoming: Any = None) -> Switched | SwitchedParams:
    """Replace factor vectors and fold the difference into the base.

    The weight does not change, except for one rounding of the base. For each planned slot k, side a first
    (arXiv:2406.06564, algorithm 1)::

        base += alpha / rank * b[:, k] (a[k] - incoming.a[k]);   a[k] = incoming.a[k]
        base += alpha / rank * (b[:, k] - incoming.b[k]) a[k];   b[:, k] = incoming.b[k]

    Both sides are folded in one pass over the base. Switching the outgoing vectors back in restores the factors bit for
    bit.

    Where only `b` is trained, the vectors of `a` that enter are orthogonal to all that stay, so the rows of `a` remain
    orthogonal. On side b zeros enter, so the column is folded into the base. A plan without side b keeps the columns.

    Sharded factors all-gather the rows of `a` that are folded. The switch is then collective: call it on every process.
    Every other switch sends nothing.

    Args:
        params: One weight, or a dict of parameters by name. Parameters without a plan are returned unchanged.
        plan: The plan of that weight, or a dict of plans by name. If active entries of a side name a slot twice, the
            first one counts.
        incoming: The vectors that enter, laid out as factors with `count` in place of `rank`. For sharded factors they
            may be sharded too. Default None generates them from the basis seed (see `candidates`). Where only `b` is
            trained, the vectors of `a` must be orthogonal to all that stay, and as long.

    Returns:
        The new weight or parameters, and the outgoing vectors.

    Raises:
        TypeError: If a part of the plan or of the vectors has a wrong type or dtype.
        ValueError: If the plan names a parameter that is missing or not low-rank, its shapes do not fit, or incoming
            vectors have the wrong shape or device. In eager mode, if incoming vectors are not orthogonal where they
            must be. In eager mode and in a compiled step, if a quantized weight is not finite. The message names the
            weight.
        NotImplementedError: If a vector or a base requires a gradient or has a tangent that would be lost: the base is
            quantized, or the factors are sharded.

    Numerics: Differences are formed in float32 or a wider dtype of factors and base. The base is then rounded once to
    its dtype. A quantized base is quantized again, from its codes and residual, where it changes (see `quantize`).
    Derivatives pass through a plain base, in reverse and in forward mode.

    Example:
        >>> import torch
        >>> from dynlora_fn import init, materialize
        >>> from dynlora_fn.schedules import every
        >>> params = init({"w": torch.ones(6, 4)}, rank=2, seed=0, targets=["w"])
        >>> new, outgoing = switch(params, every(1)(0, params))
        >>> torch.allclose(materialize(new["w"]), materialize(params["w"]))
        True
        >>> torch.equal(outgoing["w"].a, params["w"].factors.a)
        True
    """
    check_planned(params, plan, incoming)
    is_passed = incoming is not None
    if isinstance(params, LowRank):
        incoming = incoming if is_passed else planned_vectors(params, plan, "switchlora")
        weight = "param", params, plan, incoming
        _check_incoming(*weight)
        ((base, factors, removed),) = _switch_all([weight], is_shared=False)
        if is_passed and isinstance(factors, OneSidedFactors):
            check_orthogonal("param", factors, plan.a)
        return Switched(LowRank(base, factors, params.seed), removed)
    incoming = incoming if is_passed else planned_vectors(params, plan, "switchlora")
    new: dict[str, Param] = dict(params)
    outgoing: dict[str, AnyFactors] = {}
    weights = [(name, low_rank(params, name), param_plan, incoming[name]) for name, param_plan in plan.items()]
    for weight in weights:
        _check_incoming(*weight)
    if weights and torch.compiler.is_dynamo_compiling() and all(has_no_constants(weight[1]) for weight in weights):
        switched = _switch_in_graph(weights, share_plans(len(weights)))
    else:
        switched = _switch_all(weights, share_plans(len(weights)))
    for (name, param, param_plan, _), (base, factors, out) in zip(weights, switched, strict=True):
        if is_passed and isinstance(factors, OneSidedFactors):
            check_orthogonal(name, factors, param_plan.a)
        new[name], outgoing[name] = LowRank(base, factors, param.seed), out
    return SwitchedParams(new, outgoing)


def _switch_all(weights: Sequence[_Weight], is_shared: bool) -> list[tuple[Any, AnyFactors, AnyFactors]]:
    """Return the new base, the new factors and the outgoing vectors of each weight.

    With `is_shared`, weights with the same plan object compute its sources once.
    """
    sources = remembered(find_sources) if is_shared else find_sources
    return [
        _switch_tensors(name, param.base, param.factors, plan, incoming, sources)
        for name, param, plan, incoming in weights
    ]


# Dynamo does not trace into it, because tracing an operation takes longer than running it. AOTAutograd does.
@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _switch_in_graph(weights: Sequence[_Weight], is_shared: bool) -> list[tuple[Any, AnyFactors, AnyFactors]]:
    return _switch_all(weights, is_shared)


def _switch_tensors(
    name: str, base: Any, factors: AnyFactors, plan: Plan, incoming: AnyFactors, sources: "_FindSources"
) -> tuple[Any, AnyFactors, AnyFactors]:
    """Return the new base, the new factors and the outgoing vectors."""
    b, a, sharding = factors.b, factors.a, factors.sharding if isinstance(factors, ShardedFactors) else None
    if sharding and not isinstance(incoming, ShardedFactors):
        incoming = Factors(incoming.b[..., sharding.local_rows, :], incoming.a[..., sharding.as_columns.local_rows])
    wide = widest(b.dtype, a.dtype, as_base(base).sum_dtype)
    new_a = _replace(a, plan.a, incoming.a, wide, sources)
    new_b = _replace(b.mT, plan.b, incoming.b.mT, wide, sources)
    # One fold for both sides: b's columns times a's differences, and b's differences times a's new rows.
    left = torch.cat([take_rows(b.mT, plan.a.slots).mT.to(wide), new_b.difference.mT], dim=-1)
    right = torch.cat([new_a.difference, _rows_after(a, plan.a, incoming.a, plan.b.slots, sources).to(wide)], dim=-2)
    if sharding:  # each process folds into full rows of the base, so it needs all columns of `a`
        refuse_attached("gradient, sharded factors", right, name=name)
        right = gather(right.mT, sharding.as_columns).mT
    base = as_base(base).fold(left, right, divisor=divisor_of(a.shape[-2], alpha_of(factors)), name=name)
    new = factors._replace(b=new_b.rows.mT.contiguous(), a=new_a.rows)
    return base, new, factors._replace(b=new_b.outgoing.mT, a=new_a.outgoing)


class _Replaced(NamedTuple):
    rows: Tensor  # (*stack, rank, n), with the new vectors
    outgoing: Tensor  # (*stack, count, n)
    difference: Tensor  # (*stack, count, n), in the fold's dtype: outgoing - incoming where active, else 0


def _replace(
    rows: Float[Tensor, "*stack rank n"],
    plan: SidePlan,
    incoming: Float[Tensor, "*stack count n"],
    wide: torch.dtype,
    sources: "_FindSources",
) -> _Replaced:
    incoming = incoming.to(rows.dtype)
    source, is_hit, is_effective = sources(plan, rows.shape[-2])
    new = torch.where(is_hit[..., None], take_rows(incoming, source), rows) if plan.slots.shape[-1] else rows
    outgoing = take_rows(rows, plan.slots)
    difference = torch.where(is_effective[..., None], outgoing.to(wide) - incoming.to(wide), 0)
    return _Replaced(new, outgoing, difference)


def _rows_after(
    rows: Float[Tensor, "*stack rank n"],
    plan: SidePlan,
    incoming: Float[Tensor, "*stack count n"],
    index: Int[Tensor, "*#stack wanted"],
    sources: "_FindSources",
) -> Float[Tensor, "*stack wanted n"]:
    """Return the rows at `index` after the switch, without computing the other rows.

    Reading them from the new factors would keep the new factors in memory until the optimizer has written its result.
    A compiled step would then allocate a copy of the factors.
    """
    current = take_rows(rows, index)
    if not plan.slots.shape[-1]:
        return current
    source, is_hit, _ = sources(plan, rows.shape[-2])
    stack = rows.shape[:-2]
    index = index.expand(*stack, index.shape[-1])
    source, is_hit = (leaf.expand(*stack, leaf.shape[-1]).gather(-1, index) for leaf in (source, is_hit))
    return torch.where(is_hit[..., None], take_rows(incoming.to(rows.dtype), source), current)


class _Sources(NamedTuple):
    source: Int[Tensor, "*stack rank"]  # the entry that each slot is replaced from
    is_hit: Bool[Tensor, "*stack rank"]  # whether an active entry names the slot
    is_effective: Bool[Tensor, "*stack count"]  # whether the entry is active, and the first one of its slot


_FindSources: TypeAlias = Callable[[SidePlan, int], _Sources]


def find_sources(plan: SidePlan, rank: int) -> _Sources:
    """Return the source entry of each slot, and which slots and entries count.

    A slot is replaced from the first active entry that names it. Every slot is compared with every entry. Unlike a
    scatter, the comparison allows inactive entries to name any slot, and it fuses into the write of the factor.
    """
    slots, active = plan.slots, plan.active
    if slots.shape != active.shape:  # one of them may be for all members, the other for each
        slots, active = torch.broadcast_tensors(slots, active)  # type: ignore[no-untyped-call]
    entries = torch.arange(slots.shape[-1], device=slots.device)
    rows = torch.arange(rank, device=slots.device)
    names_slot = (slots[..., None, :] == rows[:, None]) & active[..., None, :]  # (*stack, rank, count)
    is_hit = names_slot.any(-1)
    first = torch.where(names_slot, entries, len(entries)).amin(-1) if len(entries) else is_hit.long()
    is_effective = active & (first.gather(-1, slots) == entries)
    return _Sources(first.clamp(max=max(len(entries) - 1, 0)), is_hit, is_effective)


def take_rows(
    matrix: Float[Tensor, "*stack rows n"], index: Int[Tensor, "*#stack count"]
) -> Float[Tensor, "*stack count n"]:
    """Return ``matrix[..., index, :]``, where members may share an index or not."""
    shape = (*matrix.shape[:-2], index.shape[-1], matrix.shape[-1])
    return matrix.gather(-2, index[..., None].expand(shape))


def _check_incoming(name: str, param: LowRank, plan: Plan, incoming: AnyFactors) -> None:
    *stack, out_features, in_features = param.shape
    if isinstance(incoming, ShardedFactors):
        if incoming.sharding != param.factor_sharding:
            raise ValueError(
                f"`incoming` for {name!r} is sharded as {incoming.sharding}, but the factors as"
                f" {param.factor_sharding}; pass all rows and columns, or shards of the same sharding"
            )
        out_features, in_features = param.factors.b.shape[-2], param.factors.a.shape[-1]
    elif isinstance(incoming, ScaledFactors | OneSidedFactors):
        check_alpha("incoming", name, incoming, "params", param.factors)
    for side, vectors, wanted in (
        ("b", incoming.b, (*stack, out_features, plan.b.slots.shape[-1])),
        ("a", incoming.a, (*stack, plan.a.slots.shape[-1], in_features)),
    ):
        if vectors.shape != wanted:
            raise ValueError(
                f"`incoming.{side}` must have shape {wanted} for {name!r}, got {tuple(vectors.shape)}; pass one vector"
                " for each entry of the plan"
            )
        if vectors.device != param.factors.a.device:
            raise ValueError(
                f"`incoming.{side}` is on {vectors.device} for {name!r}; move it to {param.factors.a.device}"
            )
