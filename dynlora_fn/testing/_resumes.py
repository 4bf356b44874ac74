"""Check runs that are interrupted and resumed."""

import io
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from dynlora_fn._core._check import check_callable, check_integer
from dynlora_fn._core._torch import tree_flatten, tree_leaves, tree_map, tree_unflatten
from dynlora_fn.testing._compare import assert_same, difference
from dynlora_fn.testing._promises import hold


def check_resumes(
    make: Callable[[], tuple[Any, Callable[[Any, int], tuple[Any, Any]]]],
    *,
    steps: int = 6,
    save: Callable[[Any], Any] | None = None,
    load: Callable[[Any, Any], Any] | None = None,
    examples: int | None = None,
) -> None:
    """Check that an interrupted and resumed run equals an uninterrupted one.

    The final states and the results of all steps must be equal bit for bit. The checker ends a run after any number of
    steps, calls `make` again as a new process would, and continues from the saved state.

    Args:
        make: A function ``() -> (state, step)`` that creates the initial state and the step. The checker calls
            ``state, aux = step(state, t)``. Values that a step stores outside the state are lost at an interruption, as
            in a killed process.
        steps: The number of steps of the run.
        save: A function of the state that returns anything. Default None saves the leaves with `torch.save`.
        load: A function ``(saved, template) -> state``, where the template is an initial state. Default None reads what
            the default of `save` returns.
        examples: The number of interruptions to draw. Default None means ``steps + 1``.

    Raises:
        BrokenPromiseError: If the runs differ. The message gives the earliest interruption.
        TypeError: If an argument has a wrong type.
        ValueError: If `steps` is negative, or `examples` is less than 1.

    Example:
        >>> import torch
        >>> def make():
        ...     return torch.zeros(2), lambda state, t: (state + t, None)
        >>> check_resumes(make)
    """
    steps = check_integer("steps", steps, least=0)
    save, load = save or _save_leaves, load or _load_leaves
    for argument, function in (("make", make), ("save", save), ("load", load)):
        check_callable(argument, function)
    wanted = _run(*make(), range(steps))

    def check(end: int) -> None:
        state, step = make()
        first = _run(state, step, range(end))
        saved = save(first[0])
        state, step = make()
        second = _run(load(saved, state), step, range(end, steps))
        for t, (got, right) in enumerate(zip(first[1] + second[1], wanted[1], strict=True)):
            change = difference(got, right)
            assert not change, f"step {t} has another result in a run interrupted after {end} steps: {change}"
        assert_same(second[0], wanted[0])

    ends = st.integers(0, steps).map(lambda end: (end,))
    examples = steps + 1 if examples is None else examples
    hold("an interrupted and resumed run equals an uninterrupted one", check, ends, examples)


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
