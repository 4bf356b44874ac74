"""Gradients of a pure loss, and a whole pure step in one compiled graph."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_leaves, tree_map, tree_unflatten

from dynlora_fn.base import inner_tensors
from dynlora_fn.consumed import Consumed, consume, memory_of


class ValueAndGrad(NamedTuple):
    """The result of a function that `value_and_grad` returns."""

    value: Any  # the loss, or `(loss, aux)`
    grads: Any  # with the structure of the first argument


def value_and_grad(
    loss_fn: Callable[..., Any], *, via: Literal["func", "autograd"] = "func", has_aux: bool = False
) -> Callable[..., ValueAndGrad]:
    """Return a function that computes `loss_fn` and its gradients with respect to the first argument.

    Args:
        loss_fn: A function of a tree of tensors and of any further arguments. It returns a 0-d tensor, and is
            differentiated with respect to all tensors of the tree.
        via: "func" uses `torch.func.grad` and composes with its transforms. "autograd" uses `torch.autograd.grad` on
            detached leaves, which permits saved-tensor hooks, and so `torch.utils.checkpoint`, inside the loss. The
            gradients are equal.
        has_aux: Whether `loss_fn` returns ``(loss, aux)``. Through "func", `aux` contains only tensors.
    """
    if via not in ("func", "autograd"):
        raise ValueError(f"`via` is {via!r}; choose 'func' or 'autograd'")
    return _via_func(loss_fn, has_aux) if via == "func" else _via_autograd(loss_fn, has_aux)


def _via_func(loss_fn: Callable[..., Any], has_aux: bool) -> Callable[..., ValueAndGrad]:
    grad_and_value = torch.func.grad_and_value(loss_fn, has_aux=has_aux)

    def function(trainable: Any, *args: Any, **kwargs: Any) -> ValueAndGrad:
        grads, value = grad_and_value(trainable, *args, **kwargs)
        return ValueAndGrad(value, grads)

    return function


def _via_autograd(loss_fn: Callable[..., Any], has_aux: bool) -> Callable[..., ValueAndGrad]:
    def function(trainable: Any, *args: Any, **kwargs: Any) -> ValueAndGrad:
        leaves, structure = tree_flatten(trainable)
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        with torch.enable_grad():
            result = loss_fn(tree_unflatten(leaves, structure), *args, **kwargs)
            loss = result[0] if has_aux else result
            grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        value = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, result)
        return ValueAndGrad(value, tree_unflatten(list(grads), structure))

    return function


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
        ValueError: At the first call, if the new state differs from the old one in structure, shape or dtype, or if
            two tensors of a donated state share memory or one requires a gradient. With `debug`, also if `aux` shares
            memory with the state.
        RuntimeError: With `debug`, if a consumed state is used.
    """

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
        with torch._dynamo.config.patch(trace_autograd_ops=True):  # for `torch.autograd.grad` inside the step
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
    from dynlora_fn.inductor import inductor_options  # noqa: PLC0415 (Inductor takes a second to import)

    # A mode is a name for a set of options, and `torch.compile` does not accept both.
    callers = {**options.get("options", {}), **torch._inductor.list_mode_options(options.get("mode", "default"))}
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
