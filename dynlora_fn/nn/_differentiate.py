"""Compute gradients with `torch.autograd.grad`.

An outer level of autograd or forward mode may differentiate them again.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from dynlora_fn._core._check import described
from dynlora_fn._core._dtypes import without_cached_casts
from dynlora_fn._core._torch import (
    forward_levels,
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_unflatten,
)


class ValueAndGrad(NamedTuple):
    """The value and the gradients that a function from `value_and_grad` returns."""

    value: Any  # the loss, or `(loss, aux)`
    grads: Any  # a tree with the structure of the first argument


class Connections(NamedTuple):
    """What some tensors depend on."""

    on_leaves: bool  # on a leaf of the tree with respect to which the loss is differentiated
    on_others: bool  # on another tensor that requires a gradient, so an outer level differentiates the gradients too


def differentiate(
    loss_fn: Callable[[Any], Any], trainable: Any, *, has_aux: bool, needs_leaf: bool = False
) -> ValueAndGrad:
    """Return the value of `loss_fn`, and its gradients with respect to `trainable`.

    Args:
        loss_fn: The loss, a function of the tree `trainable`.
        trainable: A tree of tensors.
        has_aux: Whether `loss_fn` returns ``(loss, aux)``.
        needs_leaf: Whether to refuse a loss that depends on no leaf. If False, the gradients of such a loss are zero.

    Raises:
        TypeError: If `loss_fn` does not return a 0-d tensor of a floating dtype.
        ValueError: If `loss_fn` changes a leaf in place, or if the loss depends on no leaf and `needs_leaf` is True.
    """
    leaves, structure = tree_flatten(trainable)
    is_recording, is_forward = torch.is_grad_enabled(), _is_forward()
    with torch.enable_grad():
        leaves = [_differentiable(leaf, is_recording, is_forward) for leaf in leaves]
        versions = _versions(leaves)
        with nullcontext() if torch.compiler.is_dynamo_compiling() else without_cached_casts():
            result = loss_fn(tree_unflatten(leaves, structure))
        loss = loss_in(result, has_aux)
        _check_versions(trainable, leaves, versions)
        connections = _connections_of(loss, leaves)
        if needs_leaf and not connections.on_leaves:
            raise ValueError(
                "`loss_fn` returned a loss that depends on no leaf of its first argument, so every gradient would be"
                " zero; use the argument, and no `detach()`, `item()` or `torch.no_grad()`"
            )
        is_outer = connections.on_others and is_recording
        is_aux_outer = is_recording and has_aux and _is_aux_outer(result[1], leaves)
        is_retained = is_outer or is_aux_outer
        grads = _gradients(loss, leaves, is_outer, is_retained) if connections.on_leaves else _zeros(leaves)
    if not is_forward:
        result = tree_map(lambda leaf: _detached(leaf, leaves, is_retained), result)
    return ValueAndGrad(result, tree_unflatten(grads, structure))


def _gradients(loss: Tensor, leaves: Sequence[Tensor], is_outer: bool, is_retained: bool) -> list[Tensor]:
    options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    return list(torch.autograd.grad(loss, leaves, create_graph=is_outer, retain_graph=is_retained, **options))


def _zeros(leaves: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(leaf) for leaf in leaves]


def _differentiable(leaf: Tensor, is_recording: bool, is_forward: bool) -> Tensor:
    """Return a tensor that equals `leaf`, to differentiate with respect to it.

    Gradients and tangents of an outer level pass through it to `leaf`.
    """
    if is_forward or (is_recording and leaf.requires_grad):
        view = leaf.view_as(leaf)  # not `leaf` itself, on which the loss may depend in other ways too
        return view if view.requires_grad else view.requires_grad_()
    return leaf.detach().requires_grad_()


def _is_forward() -> bool:
    return not torch.compiler.is_dynamo_compiling() and forward_levels() > 0


def _detached(leaf: Any, leaves: Sequence[Tensor], is_retained: bool) -> Any:
    """Return a leaf of the result, detached unless an outer level differentiates it."""
    if not isinstance(leaf, Tensor):
        return leaf
    is_outer = is_retained and (torch.compiler.is_dynamo_compiling() or _connections([leaf], leaves).on_others)
    return leaf if is_outer else leaf.detach()


# --- what a loss depends on


def _connections_of(loss: Tensor, leaves: Sequence[Tensor]) -> Connections:
    if torch.compiler.is_dynamo_compiling():  # Dynamo cannot trace the search
        is_outer = any(not leaf.is_leaf for leaf in leaves)
        return Connections((loss if is_outer else _only_leaves(loss, *leaves)).requires_grad, is_outer)
    return _connections([loss], leaves)


def _is_aux_outer(aux: Any, leaves: Sequence[Tensor]) -> bool:
    """Return whether an outer level differentiates a part of `aux`.

    While Dynamo traces, `aux` is not searched, and the result is False.
    """
    tensors = [leaf for leaf in tree_leaves(aux) if isinstance(leaf, Tensor)]
    return not torch.compiler.is_dynamo_compiling() and _connections(tensors, leaves).on_others


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _only_leaves(loss: Tensor, *leaves: Tensor) -> Tensor:
    """Return the loss, or refuse it if it depends on another tensor with a gradient."""
    if loss.requires_grad and _connections([loss], leaves).on_others:
        raise ValueError(
            "`loss_fn` depends on a tensor outside its first argument that requires a gradient, which does not pass"
            " through `via` = 'autograd' in a compiled function; detach that tensor, or use via='func'"
        )
    return loss


def _connections(tensors: Sequence[Tensor], leaves: Sequence[Tensor]) -> Connections:
    """Return whether some tensors depend on `leaves`, and on other leaves of autograd."""
    ends = {get_gradient_edge(leaf).node for leaf in leaves}
    visited: set[Any] = set()
    pending: list[Any] = [get_gradient_edge(tensor).node for tensor in tensors if tensor.requires_grad]
    while pending:
        node = pending.pop()
        if node is not None and node not in visited:
            visited.add(node)
            pending += [following for following, _ in node.next_functions]
    other_leaves = [node for node in visited - ends if type(node).__name__ == "AccumulateGrad"]
    return Connections(not ends.isdisjoint(visited), bool(other_leaves))


# --- checks


def loss_in(result: Any, has_aux: bool) -> Tensor:
    """Return the loss from the result of a loss function.

    Raises:
        TypeError: If the result is not ``(loss, aux)`` with `has_aux`, or the loss is not a 0-d tensor of a floating
            dtype.
    """
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
    """Raise ValueError if a leaf was changed in place.

    The gradient would otherwise be taken with respect to the changed tensor.
    """
    for at, (leaf, version) in enumerate(zip(leaves, versions, strict=False)):
        if leaf._version != version:
            path = keystr(tree_flatten_with_path(trainable)[0][at][0]) or "its root"
            raise ValueError(f"`loss_fn` changes its first argument in place, at {path}; change a copy")
