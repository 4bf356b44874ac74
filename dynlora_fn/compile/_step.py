"""A whole pure step in one compiled graph."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
    """What a function made by `compile_step` returns."""

    state: Any  # of the structure, shapes and dtypes that went in
    aux: Any  # whatever the step reports


def compile_step(
    step: Callable[..., tuple[Any, Any]], *, donate: bool = True, debug: bool = False, **options: Any
) -> Callable[..., Step]:
    """`step` in one graph: `torch.compile` with ``fullgraph=True`` and ``dynamic=False``.

    What changes from call to call must be a tensor, the learning rate and the number of the step too: a Python number
    is compiled in.

    Args:
        step: pure, ``(state, *args) -> (state, aux)``, where `state` is a tree of tensors.
        donate: write the new state into the old one's memory, inside the graph. The old state is then consumed: its
            tensors hold the new values. The functions inside stay pure.
        debug: of a donated state, return other tensors in the same memory, and let any use of the consumed ones raise.
        options: of `torch.compile`, such as ``backend`` or ``mode``.

    Returns:
        A function of the same arguments that returns `Step`, with the very tensors of the old state if donated.

    Raises:
        ValueError: at the first call, if the new state differs from the old one in structure, shape or dtype, or the
            state to be donated holds one memory twice or requires a gradient. With `debug`, also if `aux` holds memory
            of the state.
        RuntimeError: with `debug`, where a consumed state is used.
    """

    def run(state: Any, *args: Any) -> tuple[str | None, Any]:
        new_state, aux = step(state, *args)
        if not donate:
            return None, Step(new_state, aux)
        if problem := _mismatch(state, new_state):
            return problem, None  # an exception raised in here would come out as the compiler's
        aux = _apart(aux, state)
        _write(state, new_state)
        return None, aux

    # The compiler keeps graphs by code object and only so many: each step has one of its own.
    run.__code__ = run.__code__.replace()
    compiled = torch.compile(run, fullgraph=True, dynamic=False, **_with_rewrites(options))
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


def _with_rewrites(options: dict[str, Any]) -> dict[str, Any]:
    """The options with Inductor's part of `compile_step` added, unless another backend is asked for."""
    if options.get("backend", "inductor") != "inductor":
        return options
    from dynlora_fn.compile._passes import inductor_options  # noqa: PLC0415 (Inductor takes a second to import)

    # A mode is a name for options, and `torch.compile` takes one or the other.
    own = {**options.get("options", {}), **inductor_mode_options(options.get("mode", "default"))}
    rest = {name: value for name, value in options.items() if name not in ("mode", "options")}
    return {**rest, "options": {**inductor_options(), **own}}


def _mismatch(state: Any, new_state: Any) -> str | None:
    old_leaves, structure = tree_flatten(state)
    new_leaves, new_structure = tree_flatten(new_state)
    if structure != new_structure:
        return "`step` must keep the structure of its state to be donated, got another one"
    for old, new in zip(old_leaves, new_leaves, strict=True):
        if old.shape != new.shape or old.dtype != new.dtype:
            got = f"{tuple(new.shape)} {new.dtype} for {tuple(old.shape)} {old.dtype}"
            return f"`step` must keep shapes and dtypes of its state to be donated, got {got}"
    return None


def _apart(aux: Any, state: Any) -> Any:
    """Copies of those leaves that are the state's own, which is about to be overwritten."""
    own = tree_leaves(state)
    return tree_map(lambda leaf: leaf.clone() if any(leaf is one for one in own) else leaf, aux)


def _write(state: Any, new_state: Any) -> None:
    pairs = [(old, new) for old, new in zip(tree_leaves(state), tree_leaves(new_state), strict=True) if new is not old]
    inner = [pair for old, new in pairs for pair in zip(inner_tensors(old), inner_tensors(new), strict=True)]
    # Copies first: a new leaf may be an old one, or a view of it, that another write would overwrite.
    for old, new in [(old, new.clone()) for old, new in inner]:
        old.copy_(new)


def _check_donated(state: Any) -> None:
    owners: dict[int, str] = {}
    for path, leaf in tree_flatten_with_path(state)[0]:
        name = keystr(path)
        if isinstance(leaf, Consumed):
            raise ValueError(f"`state` must be the one that the last step returned, got a consumed one at {name}")
        if not isinstance(leaf, Tensor) or leaf.requires_grad:
            got = "a tensor that does" if isinstance(leaf, Tensor) else type(leaf).__name__
            raise ValueError(f"`state` must hold tensors that require no gradient to be donated, got {got} at {name}")
        for memory in memory_of(leaf):
            owner = owners.setdefault(memory, name)
            if owner != name:
                raise ValueError(f"`state` must hold no memory twice to be donated, got one at {owner} and {name}")
