"""`value_and_grad`: compute a loss and its gradients."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from dynlora_fn._core._check import check_callable, check_choice, check_flag, described
from dynlora_fn._core._func_scope import in_place_of_func, is_in_func
from dynlora_fn._core._torch import (
    forward_levels,
    is_older_than,
    is_traced,
    is_transformed,
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
)
from dynlora_fn.nn._differentiate import ValueAndGrad, differentiate, loss_in


def value_and_grad(
    loss_fn: Callable[..., Any], *, via: Literal["func", "autograd"] = "func", has_aux: bool = False
) -> Callable[..., ValueAndGrad]:
    """Return a function that computes a loss and its gradients.

    Both values of `via` give the same gradients, in the memory of `torch.autograd.grad`. The returned function takes
    the arguments of `loss_fn` and returns a `ValueAndGrad`: the value, and the gradients with respect to the first
    argument.

    The function can be differentiated again. Its results require a gradient if the loss depends on a tensor that
    requires one, such as a leaf of an outer `value_and_grad`. Then the backward pass is recorded and needs more memory,
    because no activation is freed before its end.

    Args:
        loss_fn: The loss. Its first argument is a tree of tensors, which are all differentiated. The other arguments
            may be anything. It returns a 0-d tensor.
        via: "func" composes with the transforms of `torch.func`. It uses `torch.func.grad` inside these transforms, in
            forward mode, and in compiled functions. Elsewhere it uses `torch.autograd.grad`, which frees activations.
            "autograd" always uses `torch.autograd.grad`. It permits saved-tensor hooks, and so `torch.utils.checkpoint`
            inside the loss. It can be used inside another "autograd", and around or inside a dual level of
            `torch.autograd.forward_ad`.
        has_aux: Whether `loss_fn` returns ``(loss, aux)``. With "func", `aux` may contain only tensors.

    Returns:
        The function. With `has_aux`, its value is ``(loss, aux)``.

    Raises:
        TypeError: If `loss_fn` is not a function, or `has_aux` is not a flag. In the function, if a leaf of the first
            argument is not a tensor of a floating or complex dtype, or `loss_fn` does not return a 0-d tensor of a
            floating dtype. With "func", also if `aux` contains anything other than tensors.
        RuntimeError: In the function with "func", if saved-tensor hooks are used around it or inside the loss. Also in
            inference mode under torch before 2.13, whose `torch.func.grad` returns zeros there.
        ValueError: If `via` is neither "func" nor "autograd". In the function, if `loss_fn` changes a leaf in place. In
            the function with "autograd", if it is called inside a transform of `torch.func` or a loss of "func", or if
            the loss depends on no leaf. With "func", the gradients of such a loss are zero.

    Numerics: If torch has two formulas for a derivative, `torch.func.grad` uses the formula that can be differentiated
        again. For `silu`, `mish`, `prod`, `group_norm` and `binary_cross_entropy_with_logits` the two formulas differ
        by rounding. All other gradients have the same bits in eager mode.

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
        loss_in(result, has_aux)
        if has_aux and not torch.compiler.is_dynamo_compiling():
            _check_aux(result[1])
        return result

    grad_and_value = torch.func.grad_and_value(checked_loss_fn, has_aux=has_aux)

    def function(trainable: Any, *args: Any, **kwargs: Any) -> ValueAndGrad:
        _check_leaves(trainable)
        if is_older_than(2, 13) and not is_traced() and torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"`value_and_grad` is called in inference mode, where `torch.func.grad` of torch {torch.__version__}"
                " returns zeros; use `torch.no_grad` instead of `torch.inference_mode`, or torch 2.13"
            )
        if is_traced() or _needs_func(trainable, args, kwargs):
            grads, value = grad_and_value(trainable, *args, **kwargs)
            return ValueAndGrad(value, grads)
        # Autograd, because `torch.func` also records the backward pass, and frees no activation before its end.
        aliases, named = tree_map(_alias, (args, kwargs))
        try:
            with in_place_of_func():
                return differentiate(lambda tree: checked_loss_fn(tree, *aliases, **named), trainable, has_aux=has_aux)
        except RuntimeError as error:
            if "Inference tensors cannot be saved" not in str(error):
                raise
        grads, value = grad_and_value(trainable, *args, **kwargs)  # for a loss that closes over inference tensors
        return ValueAndGrad(value, grads)

    return function


def _needs_func(trainable: Any, args: Any, kwargs: Any) -> bool:
    """Return whether autograd cannot replace `torch.func` for these arguments.

    Transforms do not see autograd. Autograd cannot save inference tensors, and needs a leaf to differentiate.
    """
    if is_transformed() or forward_levels() or torch.is_inference_mode_enabled() or not tree_leaves(trainable):
        return True
    return any(isinstance(leaf, Tensor) and leaf.is_inference() for leaf in tree_leaves((trainable, args, kwargs)))


def _alias(leaf: Any) -> Any:
    """Return an alias of a tensor. In-place changes do not change the tensor's graph."""
    if type(leaf) is not Tensor or (leaf.requires_grad and torch.is_grad_enabled()):
        return leaf
    return leaf.detach()


def _via_autograd(loss_fn: Callable[..., Any], has_aux: bool) -> Callable[..., ValueAndGrad]:
    def function(trainable: Any, *args: Any, **kwargs: Any) -> ValueAndGrad:
        if is_in_func():
            raise ValueError(
                "`via` is 'autograd' inside a transform of `torch.func`, which does not see what `torch.autograd.grad`"
                " computes; use via='func'"
            )
        _check_leaves(trainable)
        return differentiate(lambda tree: loss_fn(tree, *args, **kwargs), trainable, has_aux=has_aux, needs_leaf=True)

    return function


# --- checks


def _check_leaves(trainable: Any) -> None:
    for leaf in tree_flatten(trainable)[0]:
        if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
            path = next(path for path, other in tree_flatten_with_path(trainable)[0] if other is leaf)
            raise TypeError(
                f"the first argument has {described(leaf)} at {keystr(path) or 'its root'}, which has no gradient;"
                " pass only tensors of floating dtypes in it"
            )


def _check_aux(aux: Any) -> None:
    """Raise TypeError for a leaf of `aux` that `torch.func` does not return.

    Autograd in place of `torch.func` would return it, and the loss would fail only inside a transform.
    """
    for path, leaf in tree_flatten_with_path(aux)[0]:
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"`loss_fn` returned an `aux` with {described(leaf)} at {keystr(path) or 'its root'}; return only"
                " tensors in it, or use via='autograd'"
            )
