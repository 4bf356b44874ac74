"""A whole pure step in one compiled graph."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynlora_fn._core._check import check_callable, check_flag
from dynlora_fn._core._torch import (
    inductor_mode_options,
    keystr,
    trace_autograd_ops,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
)
from dynlora_fn._core._tree import inner_tensors
from dynlora_fn.compile._donation import Consumed, consume, memory_of


class Step(NamedTuple):
    """The result of a function that `compile_step` returns."""

    state: Any  # with the structure, shapes and dtypes of the argument
    aux: Any  # what the step reports, such as the loss


def compile_step(
    step: Callable[..., tuple[Any, Any]], *, donate: bool = True, debug: bool = False, **options: Any
) -> Callable[..., Step]:
    """Compile a step into one graph: `torch.compile` with ``fullgraph=True`` and ``dynamic=False``.

    Whatever changes between calls must be a tensor, the learning rate and the step count too. A Python number becomes a
    constant of the graph, and another number compiles the step again.

    Args:
        step: A pure function ``(state, *args) -> (state, aux)``, where `state` is a tree of tensors.
        donate: Write the new state into the memory of the old one, inside the graph. The old state is then consumed:
            its tensors contain the new values. The functions inside the step stay pure.
        debug: With a donated state, return new tensors in the same memory, and make any use of the old ones raise.
        options: Passed to `torch.compile`, such as ``backend`` or ``mode``.

    Returns:
        A function with the arguments of `step` that returns `Step`. A donated state comes back as the same tensors.

    Raises:
        TypeError: If `step` is no function, or a flag neither True nor False.
        ValueError: At the first call, if the new state differs from the old one in structure, shape or dtype, or if
            two tensors of a donated state share memory or one requires a gradient. With `debug`, also if `aux` shares
            memory with the state.
        RuntimeError: With `debug`, if a consumed state is used.
    """

    check_callable("step", step)
    check_flag("donate", donate)
    check_flag("debug", debug)

    def run(state: Any, *args: Any) -> tuple[str | None, Any]:
        new_state, aux = step(state, *args)
        if not donate:
            return None, Step(new_state, aux)
        if problem := _mismatch(state, new_state):
            return problem, None  # an exception raised here would reach the caller as an error of the compiler
        aux = _clone_leaves_of(state, aux)
        _write(state, new_state)
        return None, aux

    # Dynamo caches graphs by code object, a limited number for each: every step gets a new code object.
    run.__code__ = run.__code__.replace()
    compiled = torch.compile(run, fullgraph=True, dynamic=False, **_with_graph_passes(options))
    is_checked = False

    def compiled_step(state: Any, *args: Any) -> Step:
        nonlocal is_checked
        if donate and (debug or not is_checked):
            _check_donated(state)
            is_checked = True
        with trace_autograd_ops():  # for `torch.autograd.grad` inside the step
            problem, result = compiled(state, *args)
        if problem:
            raise ValueError(problem)
        if donate and debug:
            state = consume(state, result)
        return Step(state, result) if donate else result

    return compiled_step


def _with_graph_passes(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options with the graph passes added, if the backend is Inductor."""
    if options.get("backend", "inductor") != "inductor":
        return options
    from dynlora_fn.compile._passes import inductor_options  # noqa: PLC0415 (Inductor takes a second to import)

    # A mode is a name for a set of options, and `torch.compile` does not accept both.
    callers = {**options.get("options", {}), **inductor_mode_options(options.get("mode", "default"))}
    others = {name: value for name, value in options.items() if name not in ("mode", "options")}
    return {**others, "options": {**inductor_options(), **callers}}


def _mismatch(state: Any, new_state: Any) -> str | None:
    """Describe how the new state differs in structure, shape or dtype, if it does."""
    old_leaves, structure = tree_flatten(state)
    new_leaves, new_structure = tree_flatten(new_state)
    if structure != new_structure:
        return "`step` changes the structure of its state; return the same structure, or pass donate=False"
    for old, new in zip(old_leaves, new_leaves, strict=True):
        if old.shape != new.shape or old.dtype != new.dtype:
            change = f"from {tuple(old.shape)} {old.dtype} to {tuple(new.shape)} {new.dtype}"
            return f"`step` changes a state tensor {change}; keep shapes and dtypes, or pass donate=False"
    return None


def _clone_leaves_of(state: Any, aux: Any) -> Any:
    """Clone those leaves of `aux` that are tensors of the state, since the state is about to be written over."""
    state_leaves = tree_leaves(state)
    return tree_map(lambda leaf: leaf.clone() if any(leaf is other for other in state_leaves) else leaf, aux)


def _write(state: Any, new_state: Any) -> None:
    pairs = [(old, new) for old, new in zip(tree_leaves(state), tree_leaves(new_state), strict=True) if new is not old]
    inner = [pair for old, new in pairs for pair in zip(inner_tensors(old), inner_tensors(new), strict=True)]
    # Clone first: a new leaf may be an old one, or a view of it, that another write would overwrite.
    for old, new in [(old, new.clone()) for old, new in inner]:
        old.copy_(new)


def _check_donated(state: Any) -> None:
    owners: dict[int, str] = {}
    for path, leaf in tree_flatten_with_path(state)[0]:
        name = keystr(path)
        if isinstance(leaf, Consumed):
            problem = f"`state` tensor at {name} was written over by an earlier step"
            raise ValueError(f"{problem}; pass the state that the last step returned")
        if not isinstance(leaf, Tensor):
            problem = f"`state` at {name} is of type {type(leaf).__name__}"
            raise ValueError(f"{problem}, which cannot be donated; make it a tensor, or pass it as another argument")
        if leaf.requires_grad:
            raise ValueError(f"`state` tensor at {name} has requires_grad=True; detach it, or pass donate=False")
        for memory in memory_of(leaf):
            owner = owners.setdefault(memory, name)
            if owner != name:
                raise ValueError(f"`state` tensors at {owner} and {name} share memory; clone one, or pass donate=False")
