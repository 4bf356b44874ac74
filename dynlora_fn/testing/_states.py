"""Check projections of optimizer state, and runs that are interrupted and resumed."""

import io
from collections.abc import Callable, Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from dynlora_fn._core._torch import keystr, tree_flatten, tree_flatten_with_path, tree_leaves, tree_map, tree_unflatten
from dynlora_fn._core._types import AnyFactors, Param, Plan, is_factors
from dynlora_fn.optim._transform import Transform
from dynlora_fn.testing._compare import assert_same, kind, untouched
from dynlora_fn.testing._promises import Arguments, hold
from dynlora_fn.testing._strategies import low_rank_params, optimizer_states, plans, seeds
from dynlora_fn.testing._values import normal


def check_state_projection(
    project: Callable[[Any, Mapping[str, Plan]], Any],
    *,
    is_reset: bool = True,
    optimizer: Transform | None = None,
    arguments: Arguments = None,
    examples: int | None = None,
) -> None:
    """Check that a projection resets the state of switched vectors' counterparts and nothing else.

    For a slot k that is switched on side a, the state of ``b[:, k]`` becomes zero, moments and counts; for one on side
    b, that of ``a[k]`` (arXiv:2406.06564, section 3.3). In a field ``frozen_for``, directly above the dict by parameter
    name, the counterparts get the plan's number of updates.

    Args:
        project: A function ``(opt_state, plan) -> opt_state``, where the plan is a dict by name.
        is_reset: Whether the counterparts' state must become zero. If False, it may change in any way.
        optimizer: The optimizer whose states are drawn. Default None means `adamw()`.
        arguments: A strategy for pairs of state and plan, or one pair. Default None draws pairs of all kinds.
        examples: The number of examples to draw. Default None takes it from the hypothesis profile.

    Raises:
        BrokenPromiseError: If the promise is broken. The message gives the smallest example.

    Example:
        >>> import dynlora_fn as dl
        >>> check_state_projection(dl.project_optimizer_state)
    """

    def check(state: Any, plan: Mapping[str, Plan]) -> None:
        with untouched(state, plan):
            new = project(state, plan)
        before, structure = tree_flatten_with_path(state, is_leaf=is_factors)
        after, new_structure = tree_flatten_with_path(new, is_leaf=is_factors)
        assert structure == new_structure, f"the structure is {new_structure} instead of {structure}"
        for (path, old), (_, leaf) in zip(before, after, strict=True):
            field, name = (_key(step) for step in (None, *path)[-2:])
            if is_factors(old) and name in plan:
                value = int(plan[name].frozen_for) if field == "frozen_for" else 0
                _check_factors(keystr(path), old, leaf, plan[name], value if is_reset else None)
            else:
                assert _is_same(leaf, old), f"{keystr(path)} has changed and belongs to no counterpart"

    promise = "the counterparts of switched vectors start afresh, and nothing else changes"
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


def _check_factors(path: str, old: AnyFactors, new: AnyFactors, plan: Plan, value: int | None) -> None:
    """Compare vector by vector. The vectors of side b lie along the last axis, those of side a along the one before."""
    for side, before, after, switched in (
        ("b", old.b.mT, new.b.mT, plan.a),
        ("a", old.a, new.a, plan.b),
    ):
        assert kind(after) == kind(before), f"{path}.{side} is {kind(after)} instead of {kind(before)}"
        stack, rank = before.shape[:-2], before.shape[-2]
        slots, active = (
            leaf.broadcast_to(*stack, -1).reshape(stack.numel(), -1) for leaf in (switched.slots, switched.active)
        )
        rows = zip(before.reshape(-1, rank, before.shape[-1]), after.reshape(-1, rank, after.shape[-1]), strict=True)
        for member, (member_before, member_after) in enumerate(rows):
            counterparts = set(slots[member][active[member]].tolist())
            for slot in range(rank):
                where = f"{path}.{side}, slot {slot}" + (f" of member {member}" if stack.numel() > 1 else "")
                if slot not in counterparts:
                    assert _is_same(member_after[slot], member_before[slot]), (
                        f"{where} has changed and is no counterpart"
                    )
                elif value is not None:
                    entries = member_after[slot].unique().tolist()
                    assert entries in ([], [value]), (
                        f"{where} is the counterpart of a switched vector and holds {entries}"
                    )


def _is_same(new: Any, old: Any) -> bool:
    try:
        assert_same(new, old)
    except AssertionError:
        return False
    return True


def check_resumes(
    make: Callable[[], tuple[Any, Callable[[Any, int], tuple[Any, Any]]]],
    *,
    steps: int = 6,
    save: Callable[[Any], Any] | None = None,
    load: Callable[[Any, Any], Any] | None = None,
    examples: int | None = None,
) -> None:
    """Check that an interrupted and resumed run equals an uninterrupted one, bit for bit.

    The run ends after any number of steps and goes on from its saved state, as in another process.

    Args:
        make: A function ``() -> (state, step)`` that starts as a new process does. A step is called as
            ``state, aux = step(state, t)``. What it stores outside of the state is lost, as in a process that is
            killed.
        steps: The number of steps of the run.
        save: A function of the state that returns anything. Default None saves the bytes of the tensors.
        load: A function ``(saved, template) -> state``, where the template is a fresh state.
        examples: The number of interruptions to draw. Default None means ``steps + 1``.

    Raises:
        BrokenPromiseError: If the runs differ. The message gives the earliest interruption.

    Example:
        >>> import torch
        >>> def make():
        ...     return torch.zeros(2), lambda state, t: (state + t, None)
        >>> check_resumes(make)
    """
    save, load = save or _save_leaves, load or _load_leaves
    wanted = _run(*make(), range(steps))

    def check(end: int) -> None:
        state, step = make()
        first = _run(state, step, range(end))
        saved = save(first[0])
        state, step = make()
        second = _run(load(saved, state), step, range(end, steps))
        for t, (got, right) in enumerate(zip(first[1] + second[1], wanted[1], strict=True)):
            assert _is_same(got, right), f"step {t} reports {got} instead of {right}, broken off after {end} steps"
        assert_same(second[0], wanted[0])

    ends = st.integers(0, steps).map(lambda end: (end,))
    hold("a run that is broken off and goes on is the run that is not", check, ends, examples or steps + 1)


def _run(state: Any, step: Callable[[Any, int], tuple[Any, Any]], steps: range) -> tuple[Any, list[Any]]:
    reports = []
    for t in steps:
        state, report = step(state, t)
        reports.append(tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, report))
    return state, reports


def _save_leaves(state: Any) -> bytes:
    file = io.BytesIO()
    torch.save(tree_leaves(state), file)
    return file.getvalue()


def _load_leaves(saved: bytes, template: Any) -> Any:
    return tree_unflatten(torch.load(io.BytesIO(saved), weights_only=True), tree_flatten(template)[1])
