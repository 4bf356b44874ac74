"""The type of an optimizer, and the functions that all optimizers share."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from dynlora_fn._core._torch import tree_leaves, tree_map
from dynlora_fn._core._types import Trainable, is_factors

Tree = dict[str, Any]
Rate: TypeAlias = Tensor | float


class Transform(NamedTuple):
    """Define an optimizer as a pair of pure functions.

    ``opt_state = init(trainable)`` and ``updates, opt_state = update(grads, opt_state, trainable, lr=lr)``.
    """

    init: Callable[..., Any]
    update: Callable[..., Any]


class Updates(NamedTuple):
    """Store the result of `update` of a `Transform`."""

    updates: Tree  # to be added to the trainable parameters, see `apply_updates`
    opt_state: Any  # the new state, with the structure, shapes and dtypes of the old one


def zero_moments(trainable: Trainable) -> Tree:
    """Return zeros in the structure and shapes of the parameters.

    They are float32, or the parameter's dtype if that is wider.
    """

    def zero(leaf: Tensor) -> Tensor:
        return torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32))

    moments: Tree = tree_map(zero, dict(trainable))
    return moments


def rate_of(lr: Rate | Mapping[str, Rate], name: str) -> Rate:
    """Return the learning rate of one parameter."""
    return lr[name] if isinstance(lr, Mapping) else lr


def check_gradients(grads: Trainable, trainable: Trainable) -> None:
    """Raise if gradients do not have the names, types and shapes of the parameters.

    A gradient of another shape would be broadcast.
    """
    if set(grads) != set(trainable):
        differing = sorted(set(grads) ^ set(trainable))
        raise ValueError(
            f"`grads` must have the names of `trainable`, but only one of them has {differing}; "
            "pass the gradients of the same parameters"
        )
    for name, leaf in trainable.items():
        if is_factors(leaf) and type(grads[name]) is not type(leaf):
            raise ValueError(
                f"`grads` has a {type(grads[name]).__name__} for {name!r}, which is a {type(leaf).__name__} in"
                " `trainable`; take the gradient by the same parameters"
            )
        got, wanted = ([tuple(tensor.shape) for tensor in tree_leaves(tree)] for tree in (grads[name], leaf))
        if got != wanted:
            raise ValueError(
                f"`grads` has {name!r} of shape {', '.join(map(str, got))} for a parameter of shape "
                f"{', '.join(map(str, wanted))}; pass the gradient of that parameter"
            )


def check_is_floating(argument: str, name: str, tensor: Tensor) -> None:
    """Raise if a product with a number would be rounded to an integer."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise ValueError(
            f"`{argument}` has a tensor of dtype {tensor.dtype} for {name!r}, in which products are rounded;"
            " leave it out"
        )


def refuse_decay_of_factors(weight_decay: float, trainable: Trainable) -> None:
    """Raise if weight decay would be applied to factors.

    Decayed vectors leave and fresh ones enter, so decaying factors does not decay the weight ``base + b @ a / rank``.
    """
    names = [name for name, leaf in trainable.items() if is_factors(leaf)]
    if weight_decay and names:
        raise ValueError(
            f"`weight_decay` is {weight_decay}, but it cannot decay the weight {names[0]!r} through its factors; "
            "use weight_decay=0 for factors, and decay weights with `dl.optim.decay(params, rate)` before the update"
        )


def apply_updates(trainable: Trainable, updates: Trainable) -> Tree:
    """Add updates to the trainable parameters.

    The result has the structure, shapes and dtypes of `trainable`: ``trainable + updates``.

    Args:
        trainable: The trainable parameters by name, from `partition`.
        updates: The updates by name, from `update` of a `Transform`.

    Returns:
        The new trainable parameters by name.

    Raises:
        ValueError: If an update has another shape or node type than its parameter, or names differ.

    Numerics: The sum is computed in the wider dtype and rounded once to the parameter's dtype.

    Example:
        >>> import torch
        >>> apply_updates({"w": torch.ones(2)}, {"w": torch.tensor([0.5, -0.5])})
        {'w': tensor([1.5000, 0.5000])}
    """
    new: Tree = tree_map(_updated, dict(trainable), dict(updates))
    return new


def _updated(param: Tensor, update: Tensor) -> Tensor:
    if update.shape != param.shape:  # it would be broadcast
        raise ValueError(
            f"`updates` has a tensor of shape {tuple(update.shape)} for a parameter of shape {tuple(param.shape)}; pass"
            " the updates of the same parameters"
        )
    return (param + update).to(param.dtype)
