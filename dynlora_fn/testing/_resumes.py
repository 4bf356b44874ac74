"""Check runs that are interrupted and resumed."""

import io
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

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

    They are equal bit for bit. The run ends after any number of steps and goes on from its saved state, as in another
    process.

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
            change = difference(got, right)
            assert not change, f"step {t} reports something else, broken off after {end} steps: {change}"
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
