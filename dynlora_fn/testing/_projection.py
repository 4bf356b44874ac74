"""Check projections of optimizer state."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from dynlora_fn._core._check import check_callable, check_flag
from dynlora_fn._core._check_trees import check_trainable
from dynlora_fn._core._torch import keystr, tree_flatten_with_path, tree_map
from dynlora_fn._core._types import AnyFactors, Param, Plan, Trainable, is_factors, sides_of, with_sides
from dynlora_fn.optim._containers import Path, render
from dynlora_fn.optim._roles import Roles, check_roles, declared_roles
from dynlora_fn.optim._search_state import project_state
from dynlora_fn.optim._torch_optim import is_torch_optim
from dynlora_fn.optim._torchopt import is_torchopt
from dynlora_fn.optim._transform import Transform, check_transform
from dynlora_fn.testing._compare import difference, kind, untouched
from dynlora_fn.testing._promises import Arguments, hold
from dynlora_fn.testing._strategies import low_rank_params, optimizer_states, plans, seeds
from dynlora_fn.testing._values import normal


def check_state_projection(
    project: Callable[[Any, Mapping[str, Plan]], Any],
    *,
    is_reset: bool = True,
    optimizer: Transform | None = None,
    trainable: Trainable | None = None,
    roles: Roles | None = None,
    arguments: Arguments = None,
    examples: int | None = None,
) -> None:
    """Check that a projection resets the state of counterparts and nothing else.

    For a slot k that is switched on side a, the state of its counterpart ``b[:, k]`` must become zero: moments and
    counts. For a slot on side b the counterpart is ``a[k]`` (arXiv:2406.06564, section 3.3). In a field ``frozen_for``,
    directly above the dict by parameter name, the counterparts must get the plan's number of updates. Statistics that
    all vectors of a side share, as in Adafactor, must not change. They are fields with the role "unchanged", and sides
    with one entry for a weight of several vectors.

    Args:
        project: A function ``(opt_state, plan) -> opt_state``, where the plan is a dict by name.
        is_reset: Whether the counterparts' state must become zero. If False, it may change in any way.
        optimizer: The optimizer whose states are drawn. Default None means `adamw()`.
        trainable: The trainable parameters. They are required for states of torch.optim and torchopt, which number
            their tensors (see `project_optimizer_state`). Default None means that no such state is passed.
        roles: The roles of fields whose types declare none. Only "unchanged" matters. Default None means none.
        arguments: A strategy for pairs of state and plan, or one pair. Default None draws pairs of all kinds.
        examples: The number of examples to draw. Default None takes it from the hypothesis profile.

    Raises:
        BrokenPromiseError: If the promise is broken. The message gives the smallest example.
        TypeError: If an argument of the checker has a wrong type.
        ValueError: If a role is unknown, `examples` is less than 1, or `arguments` is empty.

    Example:
        >>> import dynlora_fn as dl
        >>> check_state_projection(dl.project_optimizer_state)
    """
    check_callable("project", project)
    check_flag("is_reset", is_reset)
    check_roles({} if roles is None else roles, "`roles`")
    if optimizer is not None:
        check_transform("optimizer", optimizer)
    if trainable is not None:
        check_trainable("trainable", trainable)

    def check(state: Any, plan: Mapping[str, Plan]) -> None:
        with untouched(state, plan):
            new = project(state, plan)
        state, new = (_by_name(tree, trainable) for tree in (state, new))
        before, structure = tree_flatten_with_path(state, is_leaf=is_factors)
        after, new_structure = tree_flatten_with_path(new, is_leaf=is_factors)
        assert structure == new_structure, f"the structure is {new_structure} instead of {structure}"
        ranks = _ranks(before)
        for (path, old), (_, leaf) in zip(before, after, strict=True):
            field, name = (_key(step) for step in (None, *path)[-2:])
            if is_factors(old) and name in plan and not _is_unchanged(state, path, roles or {}):
                value = int(plan[name].frozen_for) if field == "frozen_for" else 0
                _check_factors(keystr(path), old, leaf, plan[name], value if is_reset else None, ranks[name])
            else:
                change = difference(leaf, old)
                assert not change, f"{keystr(path)} has changed and belongs to no counterpart: {change}"

    promise = "the state of the counterparts of switched vectors is reset, and nothing else changes"
    hold(promise, check, _states_and_plans(optimizer) if arguments is None else arguments, examples)


def _key(step: Any) -> Any:
    """Return the field or key of a step of a path."""
    return getattr(step, "name", getattr(step, "key", None))


@st.composite
def _states_and_plans(draw: st.DrawFn, optimizer: Transform | None) -> tuple[Any, dict[str, Plan]]:
    param, bias = draw(low_rank_params()), draw(st.builds(normal, seeds, st.integers(1, 3)))
    params: dict[str, Param] = {"w": param, "bias": bias}
    state = draw(optimizer_states(params, optimizer=optimizer))
    return state, {"w": draw(plans(param))}


class _Collector(NamedTuple):
    """A visitor that takes the factors out of a state with numbered tensors.

    Zeros take the places of the factors.
    """

    trainable: Trainable | None
    fields: dict[str, dict[str, AnyFactors]]  # by path and name
    plan: Mapping[str, Any] = {}
    roles: Roles = {}  # noqa: RUF012

    def visit(self, leaf: AnyFactors, role: Any, name: str, path: Path) -> AnyFactors:
        self.fields.setdefault(render(path), {})[name] = leaf
        return with_sides(leaf, [torch.zeros_like(side) for side in sides_of(leaf)])  # type: ignore[no-any-return]

    def keep(self, node: Any, path: Path) -> Any:
        return node

    def check_foreign(self, library: str, path: Path) -> None:
        """Accept all libraries with a table."""


def _by_name(state: Any, trainable: Trainable | None) -> Any:
    """Return a state with factors by name in place of numbered tensors.

    States of torch.optim and torchopt have numbered tensors.
    """

    def is_foreign(node: Any) -> bool:
        return is_torch_optim(node) or is_torchopt(node)

    def converted(node: Any) -> Any:
        if not is_foreign(node):
            return node
        collector = _Collector(trainable, {})
        rest = project_state(node, collector, ())
        return {**collector.fields, "other": rest}

    return tree_map(converted, state, is_leaf=is_foreign)


def _ranks(leaves: Sequence[tuple[Any, Any]]) -> dict[Any, int]:
    """Return the rank of each weight: the largest number of vectors in its fields."""
    ranks: dict[Any, int] = {}
    for path, leaf in leaves:
        if is_factors(leaf) and path:
            name = _key(path[-1])
            ranks[name] = max(ranks.get(name, 1), leaf.b.shape[-1], *[a.shape[-2] for a in sides_of(leaf)[1:]])
    return ranks


def _is_unchanged(state: Any, path: Sequence[Any], roles: Roles) -> bool:
    """Return whether a field on the path has the role "unchanged"."""
    node = state
    for step in path:
        if {**roles, **declared_roles(node)}.get(_key(step)) == "unchanged":
            return True
        node = step.get(node)
    return False


def _check_factors(path: str, old: AnyFactors, new: AnyFactors, plan: Plan, value: int | None, rank: int) -> None:
    """Compare the factors of a field before and after a projection, vector by vector.

    `value` is what the counterparts must contain. None allows anything.
    """
    sides = zip("ba", sides_of(old), sides_of(new), (plan.a, plan.b), strict=False)
    for side, old_side, new_side, switched in sides:
        before, after = (old_side.mT, new_side.mT) if side == "b" else (old_side, new_side)
        assert kind(after) == kind(before), f"{path}.{side} is {kind(after)} instead of {kind(before)}"
        if before.shape[-2] != rank:
            change = difference(after, before)
            assert not change, f"{path}.{side} has changed and is shared by all vectors: {change}"
            continue
        stack = before.shape[:-2]
        slots, active = (
            leaf.broadcast_to(*stack, -1).reshape(stack.numel(), -1) for leaf in (switched.slots, switched.active)
        )
        rows = zip(before.reshape(-1, rank, before.shape[-1]), after.reshape(-1, rank, after.shape[-1]), strict=True)
        for member, (member_before, member_after) in enumerate(rows):
            counterparts = set(slots[member][active[member]].tolist())
            for slot in range(rank):
                where = f"{path}.{side}, slot {slot}" + (f" of member {member}" if stack.numel() > 1 else "")
                _check_vector(
                    where, member_before[slot], member_after[slot], value, is_counterpart=slot in counterparts
                )


def _check_vector(where: str, old: Tensor, new: Tensor, value: int | None, *, is_counterpart: bool) -> None:
    if not is_counterpart:
        change = difference(new, old)
        assert not change, f"{where} has changed and is not a counterpart: {change}"
    elif value is not None:
        wrong = new[new != value].tolist()
        assert not wrong, (
            f"{where} is the counterpart of a switched vector and has {wrong[0]} instead of {value} in "
            f"{len(wrong)} of {new.numel()} entries"
        )
