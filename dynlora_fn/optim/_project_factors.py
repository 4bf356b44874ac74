"""Apply a rule to the factors at one place of an optimizer's state."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, NoReturn, TypeAlias

from torch import Tensor

from dynlora_fn._core._check import described
from dynlora_fn._core._check_plan import check_fits
from dynlora_fn._core._check_trees import check_params
from dynlora_fn._core._types import (
    AnyFactors,
    Factors,
    LowRank,
    Params,
    Plan,
    Plans,
    ShardedFactors,
    SidePlan,
    Trainable,
    is_factors,
    sides_of,
    with_sides,
)
from dynlora_fn.optim._containers import Path, render
from dynlora_fn.optim._eight_bit import decode_moments, is_eight_bit, moment_shape
from dynlora_fn.optim._roles import Role
from dynlora_fn.optim._state_rules import is_pruned, replace_where, reset, transport

Rule: TypeAlias = Literal["reset", "reset_thawed", "keep", "prune", "transport"]


class Change(NamedTuple):
    """The parameters before and after a switch, for the rule "transport"."""

    before: Params
    after: Params


def check_change(change: Any) -> None:
    """Raise if a value is neither None nor a `Change` with two dicts of parameters."""
    if change is None:
        return
    if not isinstance(change, tuple) or len(change) != 2:
        raise TypeError(f"`change` is {described(change)}; pass a Change with the parameters before and after")
    for field, params in zip(Change._fields, change, strict=True):
        check_params(f"change.{field}", params)


class Context(NamedTuple):
    """What the new value of a leaf depends on beside the leaf."""

    plan: Plans
    rule: Rule
    prune: float
    change: Change | None
    trainable: Trainable | None
    roles: Mapping[str, Role]  # of fields whose types do not declare roles
    projected: set[str]  # names of planned parameters to which the rule was applied
    ranks: dict[str, int]  # by name, from the first factors that were found
    first_moments: dict[str, dict[Path, AnyFactors]]  # by name, collected for "prune"
    counterparts: Callable[[SidePlan, SidePlan, int], Factors]  # `_state_rules.counterparts`, maybe with a cache

    def visit(self, leaf: AnyFactors, role: Role, name: str, path: Path) -> AnyFactors:
        return project_factors(leaf, role, name, path, self)

    def keep(self, node: Any, path: Path) -> Any:
        return node

    def check_foreign(self, library: str, path: Path) -> None:
        """Accept the states of all known libraries."""


def project_factors(leaf: AnyFactors, role: Role, name: str, path: Path, context: Context) -> AnyFactors:
    """Apply the rule to the state of one parameter, which is at `path` in the state.

    Raises:
        ValueError: If the shapes do not fit the role, or the rule cannot be applied to such a state.
    """
    shape = _checked_shape(leaf, role, name, path, context)
    if name not in context.plan:
        return leaf
    plan, rule = context.plan[name], context.rule
    if name not in context.projected:
        check_fits("plan", name, plan, shape[:-2], shape[-1])
        _check_device(leaf, plan, name)
    if rule in ("reset", "reset_thawed"):
        leaf = reset(leaf, role, plan, context.counterparts, is_count_delayed=rule == "reset_thawed")
    elif rule == "prune" and _has_entries(leaf, role):
        leaf = _prune(leaf, role, name, path, context)
    elif rule == "transport" and role == "first_moment":
        leaf = _transport(leaf, name, context)
    elif rule != "keep":
        return leaf
    context.projected.add(name)
    return leaf


def _check_device(leaf: AnyFactors, plan: Plan, name: str) -> None:
    b: Any = leaf.b
    device = (b.codes if is_eight_bit(b) else b).device
    if plan.b.slots.device != device:
        raise ValueError(f"`plan` is on {plan.b.slots.device} for {name!r}, but `opt_state` on {device}; move one")


def numbered_sides(trainable: Trainable) -> tuple[dict[str, tuple[int, int]], int]:
    """Return the indices of `b` and `a` of each weight, and the number of all tensors."""
    indices, count = {}, 0
    for name, leaf in trainable.items():
        if is_factors(leaf):
            _refuse_one_side(name, leaf)
            indices[name] = (count, count + 1)
        count += 2 if is_factors(leaf) else 1
    return indices, count


def _refuse_one_side(name: str, leaf: AnyFactors) -> None:
    """Raise ValueError for a weight that trains only `b` in another library's state."""
    if len(sides_of(leaf)) == 1:
        raise ValueError(
            f"`trainable` has only `b` of {name!r}, but states of torch.optim and torchopt are only projected for"
            " weights that train both sides; use an optimizer of `dl.optim`"
        )


def _has_entries(leaf: AnyFactors, role: Role) -> bool:
    """Return whether a leaf is a moment with an entry for each entry of the factors.

    Other second moments have one entry for each vector.
    """
    b, *others = map(moment_shape, sides_of(leaf))
    is_per_vector = b[-2] == 1 and all(a[-1] == 1 for a in others)
    return role == "first_moment" or (role == "second_moment" and not is_per_vector)


def _prune(leaf: AnyFactors, role: Role, name: str, path: Path, context: Context) -> AnyFactors:
    _refuse_shards(isinstance(leaf, ShardedFactors), name, "prune")
    moments = with_sides(leaf, [*map(decode_moments, sides_of(leaf))])
    if role == "first_moment":
        context.first_moments.setdefault(name, {})[path] = moments
    first = [moments] if role == "first_moment" else [*context.first_moments.get(name, {}).values()]
    plan = context.plan[name]
    is_counterpart = context.counterparts(plan.b, plan.a, moment_shape(leaf.b)[-1])
    sides = [sides_of(each) for each in (leaf, moments, is_counterpart)]
    new = [
        replace_where(side, is_pruned(moment, mask, [sides_of(each)[at] for each in first], context.prune))
        for at, (side, moment, mask) in enumerate(zip(*sides, strict=False))
    ]
    return with_sides(leaf, new)  # type: ignore[no-any-return]


def _transport(leaf: AnyFactors, name: str, context: Context) -> AnyFactors:
    if not all(isinstance(side, Tensor) for side in sides_of(leaf)):
        raise ValueError(
            f"`rule` must not be 'transport' for 8-bit moments, got them for {name!r}; use float32 moments"
        )
    before, after = (params.get(name) for params in context.change or ({}, {}))
    if not (isinstance(before, LowRank) and isinstance(after, LowRank)):
        raise ValueError(
            f"`change` must have the low-rank weight {name!r} before and after the switch, got "
            f"{type(before).__name__} and {type(after).__name__}; pass both dicts of parameters"
        )
    is_sharded = isinstance(leaf, ShardedFactors) or before.factor_sharding or after.factor_sharding
    _refuse_shards(bool(is_sharded), name, "transport")
    for field, param in zip(Change._fields, (before, after), strict=True):
        if param.factors.b.shape[-1] != moment_shape(leaf.b)[-1]:
            raise ValueError(
                f"`change.{field}` has rank {param.factors.b.shape[-1]} for {name!r}, but its state has rank"
                f" {moment_shape(leaf.b)[-1]}; pass the parameters of this switch"
            )
    plan = context.plan[name]
    mask = context.counterparts(plan.b, plan.a, moment_shape(leaf.b)[-1])
    return transport(leaf, before.factors, after.factors, mask)


def _refuse_shards(is_sharded: bool, name: str, rule: Rule) -> None:
    """Raise ValueError for a rule that would need the entries of all processes."""
    if is_sharded:
        raise ValueError(f"`rule` must not be {rule!r} for sharded factors, got them for {name!r}; use 'reset'")


def _checked_shape(leaf: AnyFactors, role: Role, name: str, path: Path, context: Context) -> tuple[int, ...]:
    """Return the shape of side b, or raise ValueError if shapes do not fit the role."""
    shapes = _shapes(leaf)
    b, a = shapes[0], shapes[-1]
    is_one_sided = len(shapes) == 1
    if min(len(b), len(a)) < 2 or not (is_one_sided or (b[:-2] == a[:-2] and b[-1] == a[-2])):
        _refuse_shape(leaf, name, path, "equal stack axes and one rank, as (*stack, out, rank) and (*stack, rank, in)")
    if context.ranks.setdefault(name, b[-1]) != b[-1]:
        _refuse_shape(leaf, name, path, f"the rank {context.ranks[name]} of the other fields of {name!r}")
    if role in ("count", "frozen_for") and shapes != _per_vector(shapes):
        vectors = " and ".join(map(str, _per_vector(shapes)))
        _refuse_shape(leaf, name, path, f"one entry for each vector as {role!r}, {vectors}")
    param = (context.trainable or {}).get(name)
    if param is None:
        return b
    if isinstance(param, Tensor):
        _refuse_shape(leaf, name, path, f"the shape {tuple(param.shape)} of that tensor in `trainable`")
    wanted = _shapes(param)
    allowed = {"first_moment": [wanted], "second_moment": [wanted, _per_vector(wanted)]}
    if shapes not in allowed.get(role, [_per_vector(wanted)]):
        _refuse_shape(leaf, name, path, f"the shapes of {role!r} for factors {' and '.join(map(str, wanted))}")
    return b


def _shapes(leaf: AnyFactors) -> tuple[tuple[int, ...], ...]:
    """Return the shape of each side."""
    return tuple(map(moment_shape, sides_of(leaf)))


def _per_vector(shapes: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of sides with one entry for each vector."""
    b, *others = shapes
    return ((*b[:-2], 1, b[-1]), *((*a[:-1], 1) for a in others))


def _refuse_shape(leaf: AnyFactors, name: str, path: Path, wanted: str) -> NoReturn:
    raise ValueError(
        f"`opt_state` has factors of {name!r} at {render(path)} of shapes {' and '.join(map(str, _shapes(leaf)))}; "
        f"they must have {wanted}"
    )
