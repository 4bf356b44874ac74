"""`compile_step`: compile a pure step into one graph."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynlora_fn._core._check import check_callable, check_flag
from dynlora_fn._core._torch import (
    inductor_mode_options,
    keystr,
    reads_of_mutated_buffers,
    trace_autograd_ops,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_unflatten,
)
from dynlora_fn._core._tree import inner_tensors
from dynlora_fn.compile._arguments import Calls, named_leaves
from dynlora_fn.compile._donation import Donated, consume
from dynlora_fn.compile._memory import sharing
from dynlora_fn.compile._structure import Pair, mismatch, pair_leaves

# What `aux` may contain beside tensors. Other objects could contain tensors of the state, which would be written over.
_WITHOUT_TENSORS = (type(None), bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device, torch.Size)


class Step(NamedTuple):
    """The result of a compiled step: the new state, and what the step reports."""

    state: Any  # the new state, with the structure, shapes and dtypes of the old state
    aux: Any  # what the step reports, such as the loss


def compile_step(
    step: Callable[..., tuple[Any, Any]],
    *,
    donate: bool = True,
    dynamic: bool | None = False,
    debug: bool = False,
    **options: Any,
) -> Callable[..., Step]:
    """Compile a step into one graph with `torch.compile`.

    The compiled step returns the same values as the step, to rounding. Everything that changes between calls must be a
    tensor, also the learning rate and the step count. A Python number becomes a constant of the graph, so another
    number recompiles the step.

    Args:
        step: A pure function ``(state, *args, **kwargs) -> (state, aux)``, where `state` is a tree of tensors.
        donate: Whether to write the new state into the memory of the old state, inside the graph. The old state is then
            consumed: its tensors contain the new values. The functions inside the step stay pure. Tensors in `aux` that
            share memory with the state are copied, so they keep their values.
        dynamic: Whether sizes and Python numbers that changed between two calls become variables of the graph. With
            False, every new shape recompiles the step, which torch allows eight times. None means the same as True.
        debug: Whether to return new tensors in the memory of a donated state, and to raise an error at any use of the
            old tensors.
        options: Further arguments of `torch.compile`, such as ``backend``, ``mode`` or ``options``. None means torch's
            default. ``options`` takes precedence over ``mode``.

    Returns:
        A function with the arguments of `step` that returns a `Step`. With a donated state, the tensors of the new
        state are the tensors that were passed.

    Raises:
        TypeError: If `step` is not a function, `donate` or `debug` is not a flag, or `torch.compile` does not take an
            option.
        ValueError: If ``fullgraph=False`` is passed. At a call, if torch has recompiled the step as often as it allows;
            the message names the arguments that change. Also if `step` returns no pair. At a call with a donated state,
            if the new state differs from the old state in structure, shape or dtype. Also if tensors of the state share
            memory, or one of them is expanded, requires a gradient or was written over before, or was made in inference
            mode and is passed outside of it. Also if another argument is a view of the state, or `aux` contains an
            object that may contain tensors.
        RuntimeError: With `debug`, if a consumed state is used.

    Example: The new state is in the memory of the old state.
        >>> step = compile_step(lambda state, lr: (state - lr, state.sum()), backend="aot_eager")
        >>> state = torch.zeros(2)
        >>> new, total = step(state, torch.tensor(0.5))
        >>> new is state, new.tolist(), total.item()
        (True, [-0.5, -0.5], 0.0)
    """
    from dynlora_fn._core._torch import FailOnRecompileLimitHit, comptime  # noqa: PLC0415 (Dynamo takes a second)

    check_callable("step", step)
    check_flag("donate", donate)
    check_flag("debug", debug)
    share_memory, calls, donated = sharing(), Calls(step), Donated()
    current: list[Any] = []  # the running call, which Dynamo may trace: its contexts and its arguments

    def run(state: Any, *args: Any, **kwargs: Any) -> tuple[str | None, Any]:
        comptime(begin_trace)
        result = step(state, *args, **kwargs)
        if not isinstance(result, tuple | list) or len(result) != 2:
            return f"`step` returned a {type(result).__name__}, but must return a pair; return `(state, aux)`", None
        new_state, aux = result
        if not donate:
            return None, Step(new_state, aux)
        # An exception raised here would reach the caller as an error of the compiler.
        pairs: list[Pair] = []
        if not pair_leaves(state, new_state, pairs):
            return (
                "`step` changes the structure of its state; return the same types and keys in the same order, or pass "
                "donate=False"
            ), None
        if problem := mismatch(state, pairs) or _unknown_object(aux):
            return problem, None
        aux = _keep_values(aux, [old for old, _ in pairs], share_memory)
        _write(pairs)
        return None, aux

    def begin_trace(_: Any) -> None:
        contexts, args, kwargs = current[-1]
        contexts.enter_context(trace_autograd_ops())  # for `torch.autograd.grad` inside the step
        if _is_inductor(options):
            contexts.enter_context(reads_of_mutated_buffers())
        calls.note(args, kwargs)

    # Dynamo caches a limited number of graphs for each code object, so every step gets a new code object.
    run.__code__ = run.__code__.replace()
    compiled = torch.compile(run, fullgraph=True, dynamic=None if dynamic else dynamic, **_torch_options(options))

    def compiled_step(state: Any, *args: Any, **kwargs: Any) -> Step:
        if donate:
            view = donated.check(state, (args, kwargs))
            if view is not None:
                raise ValueError(_problem_of_view(view, donated, step, (state, *args), kwargs))
        with ExitStack() as contexts:
            current.append((contexts, (state, *args), kwargs))
            contexts.callback(current.pop)
            try:
                problem, result = compiled(state, *args, **kwargs)
            except FailOnRecompileLimitHit as error:
                raise ValueError(calls.problem((state, *args), kwargs)) from error
        if problem:
            raise ValueError(problem)
        if donate and debug:
            state = consume(state)
        return Step(state, result) if donate else result

    return compiled_step


def _is_inductor(options: Mapping[str, Any]) -> bool:
    return (options.get("backend") or "inductor") == "inductor"


def _torch_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments for `torch.compile`, with the graph passes for Inductor.

    Raises:
        TypeError: If `torch.compile` has no argument of that name.
        ValueError: If ``fullgraph=False`` is passed.
    """
    known = set(inspect.signature(torch.compile).parameters) - {"model", "dynamic"}
    if unknown := sorted(set(options) - known):
        raise TypeError(f"`compile_step` got the options {unknown}; `torch.compile` takes {', '.join(sorted(known))}")
    if not options.get("fullgraph", True):
        raise ValueError(
            f"`fullgraph` is {options['fullgraph']!r}, but a step must be compiled into one graph; remove the argument"
        )
    others = {
        name: value
        for name, value in options.items()
        if value is not None and name not in ("fullgraph", "mode", "options")
    }
    if not _is_inductor(others):
        settings = {name: options[name] for name in ("mode", "options") if options.get(name) is not None}
        return {**others, **settings}
    from dynlora_fn.compile._passes import inductor_options  # noqa: PLC0415 (Inductor takes a second to import)

    # A mode is a set of options, and `torch.compile` does not accept a mode and options together.
    callers = {**inductor_mode_options(options.get("mode") or "default"), **(options.get("options") or {})}
    return {**others, "options": {**inductor_options(), **callers}}


def _problem_of_view(
    view: Tensor, donated: Donated, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str:
    """Return the error message for an argument that is a view of the state.

    A graph could write the state before it reads the view. An argument that is a tensor of the state is no problem,
    since Dynamo recognizes it.
    """
    name = next(name for name, leaf in named_leaves(step, args, kwargs).items() if leaf is view)
    owner = donated.owner(view)
    return f"`{name}` shares memory with the donated `state` tensor at {owner}; pass a clone, or donate=False"


def _unknown_object(aux: Any) -> str | None:
    """Return the error message for an object in `aux` that may contain tensors.

    Return None if there is no such object.
    """
    for index, leaf in enumerate(tree_leaves(aux)):
        if not isinstance(leaf, (Tensor, *_WITHOUT_TENSORS)):
            name = keystr(tree_flatten_with_path(aux)[0][index][0])
            return f"`aux{name}` is of type {type(leaf).__name__}; return tensors and numbers in dicts, lists or tuples"
    return None


def _keep_values(aux: Any, old: list[Tensor], share_memory: Callable[[list[Tensor], list[Tensor]], Any]) -> Any:
    """Clone the tensors of `aux` that share memory with the state.

    Call this before the step writes over the state.
    """
    leaves, structure = tree_flatten(aux)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    is_shared = iter(share_memory(tensors, old))
    leaves = [leaf.clone() if isinstance(leaf, Tensor) and next(is_shared) else leaf for leaf in leaves]
    return tree_unflatten(leaves, structure)


def _write(pairs: list[Pair]) -> None:
    old: list[Tensor] = []
    new: list[Tensor] = []
    for leaf, new_leaf in pairs:
        if type(leaf) is type(new_leaf) is Tensor and new_leaf is not leaf:
            old.append(leaf)
            new.append(new_leaf)
        elif new_leaf is not leaf:
            old += inner_tensors(leaf)
            new += inner_tensors(new_leaf)
    _copy(old, new)


# With `allow_in_graph`, AOTAutograd traces this function instead of Dynamo, which takes longer for each operation.
@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _copy(old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    # Clone first, since a new leaf may be an old leaf, or a view of one, that another write overwrites.
    for leaf, value in [(leaf, value.clone()) for leaf, value in zip(old, new, strict=True)]:
        leaf.copy_(value)
