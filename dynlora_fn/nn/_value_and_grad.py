"""The value and the gradients of a pure loss function."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dynlora_fn._core._check import check_callable, check_choice, check_flag
from dynlora_fn._core._torch import tree_flatten, tree_map, tree_unflatten


class ValueAndGrad(NamedTuple):
    """The result of a function that `value_and_grad` returns."""

    value: Any  # the loss, or `(loss, aux)`
    grads: Any  # a tree with the structure of the first argument


def value_and_grad(
    loss_fn: Callable[..., Any], *, via: Literal["func", "autograd"] = "func", has_aux: bool = False
) -> Callable[..., ValueAndGrad]:
    """Return a function that computes a loss and its gradients.

    The function takes the arguments of `loss_fn` and returns `ValueAndGrad`: the value, and the gradients with respect
    to the first argument. Both ways give the same gradients.

    Args:
        loss_fn: The loss. Its first argument is a tree of tensors, which are all differentiated; the other arguments
            may be anything. It returns a 0-d tensor.
        via: "func" uses `torch.func.grad` and composes with the transforms of `torch.func`. "autograd" uses
            `torch.autograd.grad` on detached leaves. That permits saved-tensor hooks, and so `torch.utils.checkpoint`
            inside the loss.
        has_aux: Whether `loss_fn` returns ``(loss, aux)``. With "func", `aux` contains only tensors.

    Returns:
        The function.

    Raises:
        TypeError: If `loss_fn` is no function, or `has_aux` no flag.
        ValueError: If `via` is neither "func" nor "autograd".

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
