"""The value and gradients of a pure loss."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dynlora_fn._core._torch import tree_flatten, tree_map, tree_unflatten


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
