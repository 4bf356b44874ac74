"""The value and the gradients of a pure loss function."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from dynlora_fn._core._check import check_callable, check_choice, check_flag, described
from dynlora_fn._core._torch import (
    forward_levels,
    is_transformed,
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_map,
    tree_unflatten,
)


class ValueAndGrad(NamedTuple):
    """The result of a function that `value_and_grad` returns."""

    value: Any  # the loss, or `(loss, aux)`
    grads: Any  # a tree with the structure of the first argument


class Connections(NamedTuple):
    """What a loss depends on."""

    on_leaves: bool  # on a leaf that it is differentiated by
    on_others: bool  # on another tensor that requires a gradient, so that an outer level differentiates gradients too


def value_and_grad(
    loss_fn: Callable[..., Any], *, via: Literal["func", "autograd"] = "func", has_aux: bool = False
) -> Callable[..., ValueAndGrad]:
    """Return a function that computes a loss and its gradients.

    The function takes the arguments of `loss_fn` and returns `ValueAndGrad`: the value, and the gradients with respect
    to the first argument. Both ways give the same gradients, and both can be differentiated again. The results require
    a gradient if something does that the loss depends on, as a leaf of the first argument in an outer `value_and_grad`.

    Args:
        loss_fn: The loss. Its first argument is a tree of tensors, which are all differentiated; the other arguments
            may be anything. It returns a 0-d tensor.
        via: "func" uses `torch.func.grad` and composes with the transforms of `torch.func`. "autograd" uses
            `torch.autograd.grad`. That permits saved-tensor hooks, and so `torch.utils.checkpoint` inside the loss. It
            may be inside another "autograd", and around or inside a dual level of `torch.autograd.forward_ad`.
        has_aux: Whether `loss_fn` returns ``(loss, aux)``. With "func", `aux` contains only tensors.

    Returns:
        The function.

    Raises:
        TypeError: If `loss_fn` is no function, or `has_aux` no flag. In the function, if a leaf of the first argument
            is not a tensor of a floating dtype, or `loss_fn` does not return a 0-d tensor of one.
        ValueError: If `via` is neither "func" nor "autograd". In the function with "autograd", if it is called inside a
            transform of `torch.func`, the loss depends on no leaf, or `loss_fn` changes a leaf in place. With "func"
            the gradients of a loss that depends on no leaf are zero.

    Example:
        >>> import torch
        >>> value_and_grad(lambda w, x: (w * x).sum())(torch.ones(2), torch.tensor([1.0, 2.0]))
        ValueAndGrad(value=tensor(3.), grads=tensor([1., 2.]))
    """
    check_callable("loss_fn", loss_fn)
    check_choice("via", via, ("func", "autograd"))
    check_flag("has_aux", has_aux)
    return _via_func(loss_fn, has_aux) if via == "func" else _via_autograd(loss_fn, has_aux)


def _via_func(loss_fn: Callable[..., Any], has_aux: bool) -> Callable[..., ValueAndGrad]:
    def checked_loss_fn(*args: Any, **kwargs: Any) -> Any:
        result = loss_fn(*args, **kwargs)
        _loss_in(result, has_aux)
        return result

    grad_and_value = torch.func.grad_and_value(checked_loss_fn, has_aux=has_aux)

    def function(trainable: Any, *args: Any, **kwargs: Any) -> ValueAndGrad:
        _check_leaves(trainable)
        grads, value = grad_and_value(trainable, *args, **kwargs)
        return ValueAndGrad(value, grads)

    return function


def _via_autograd(loss_fn: Callable[..., Any], has_aux: bool) -> Callable[..., ValueAndGrad]:
    def function(trainable: Any, *args: Any, **kwargs: Any) -> ValueAndGrad:
        if is_transformed():
            raise ValueError(
                "`via` is 'autograd' inside a transform of `torch.func`, which does not see what `torch.autograd.grad`"
                " computes; use via='func'"
            )
        _check_leaves(trainable)
        leaves, structure = tree_flatten(trainable)
        is_recording, is_forward = torch.is_grad_enabled(), _is_forward()
        with torch.enable_grad():
            leaves = [_differentiable(leaf, is_recording, is_forward) for leaf in leaves]
            versions = _versions(leaves)
            result = loss_fn(tree_unflatten(leaves, structure), *args, **kwargs)
            loss = _loss_in(result, has_aux)
            _check_versions(trainable, leaves, versions)
            is_outer = _is_differentiated(loss, leaves) and is_recording
            grads = torch.autograd.grad(loss, leaves, create_graph=is_outer, allow_unused=True, materialize_grads=True)
        if not (is_outer or is_forward):
            result = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, result)
        return ValueAndGrad(result, tree_unflatten(list(grads), structure))

    return function


def _differentiable(leaf: Tensor, is_recording: bool, is_forward: bool) -> Tensor:
    """Return a tensor to differentiate by. Gradients and tangents of an outer level pass through it to `leaf`."""
    if is_forward or (is_recording and leaf.requires_grad):
        view = leaf.view_as(leaf)  # not `leaf` itself, on which the loss may depend in other ways too
        return view if view.requires_grad else view.requires_grad_()
    return leaf.detach().requires_grad_()


def _is_forward() -> bool:
    return not torch.compiler.is_dynamo_compiling() and forward_levels() > 0


def _is_differentiated(loss: Tensor, leaves: Sequence[Tensor]) -> bool:
    """Return whether an outer level differentiates the gradients too: the loss depends on a tensor of that level.

    Raises:
        ValueError: If the loss depends on no leaf.
    """
    if torch.compiler.is_dynamo_compiling():  # it cannot trace the search
        is_outer = any(not leaf.is_leaf for leaf in leaves)
        connections = Connections((loss if is_outer else _only_leaves(loss, *leaves)).requires_grad, is_outer)
    else:
        connections = _connections(loss, leaves)
    if not connections.on_leaves:
        raise ValueError(
            "`loss_fn` returned a loss that depends on no leaf of its first argument, so every gradient would be zero;"
            " use the argument, and no `detach()`, `item()` or `torch.no_grad()`"
        )
    return connections.on_others


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _only_leaves(loss: Tensor, *leaves: Tensor) -> Tensor:
    """Return the loss, and refuse one that depends on another tensor that requires a gradient."""
    if loss.requires_grad and _connections(loss, leaves).on_others:
        raise ValueError(
            "`loss_fn` depends on a tensor outside its first argument that requires a gradient, which does not pass"
            " through `via` = 'autograd' in a compiled function; detach that tensor, or use via='func'"
        )
    return loss


def _connections(loss: Tensor, leaves: Sequence[Tensor]) -> Connections:
    """Return what a loss depends on."""
    ends = {get_gradient_edge(leaf).node for leaf in leaves}
    visited: set[Any] = set()
    pending: list[Any] = [get_gradient_edge(loss).node] if loss.requires_grad else []
    while pending:
        node = pending.pop()
        if node is not None and node not in visited:
            visited.add(node)
            pending += [following for following, _ in node.next_functions]
    other_leaves = [node for node in visited - ends if type(node).__name__ == "AccumulateGrad"]
    return Connections(not ends.isdisjoint(visited), bool(other_leaves))


# --- checks


def _check_leaves(trainable: Any) -> None:
    for leaf in tree_flatten(trainable)[0]:
        if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
            path = next(path for path, other in tree_flatten_with_path(trainable)[0] if other is leaf)
            raise TypeError(
                f"the first argument has {described(leaf)} at {keystr(path) or 'its root'}, which has no gradient;"
                " pass only tensors of floating dtypes in it"
            )


def _loss_in(result: Any, has_aux: bool) -> Tensor:
    """Return the loss in what `loss_fn` returned."""
    if has_aux and not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(f"`loss_fn` returned {described(result)} for has_aux=True; return `(loss, aux)`")
    loss = result[0] if has_aux else result
    if not isinstance(loss, Tensor) or loss.ndim or not loss.is_floating_point():
        raise TypeError(
            f"`loss_fn` returned {described(loss)} as the loss; return a 0-d tensor of a floating dtype, such as a"
            " `mean()`, and pass has_aux=True for `(loss, aux)`"
        )
    return loss


def _versions(leaves: Sequence[Tensor]) -> list[int]:
    return [] if torch.compiler.is_dynamo_compiling() else [leaf._version for leaf in leaves]


def _check_versions(trainable: Any, leaves: Sequence[Tensor], versions: Sequence[int]) -> None:
    """Raise if a leaf was changed in place: the gradient would be that of the changed tensor."""
    for at, (leaf, version) in enumerate(zip(leaves, versions, strict=False)):
        if leaf._version != version:
            path = keystr(tree_flatten_with_path(trainable)[0][at][0]) or "its root"
            raise ValueError(f"`loss_fn` changes its first argument in place, at {path}; change a copy")
