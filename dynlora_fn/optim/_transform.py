"""`Transform`, `apply_updates`, and functions that all optimizers share."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from dynlora_fn._core._check import check_by_name, check_number, check_rate, described, plain_rate
from dynlora_fn._core._check_trees import check_trainable_with
from dynlora_fn._core._torch import tree_map
from dynlora_fn._core._types import Trainable, is_factors
from dynlora_fn.optim._elementwise import elementwise

Tree = dict[str, Any]
Rate: TypeAlias = Tensor | float


class Transform(NamedTuple):
    """An optimizer: a pair of pure functions.

    Call ``opt_state = init(trainable)``, then ``updates, opt_state = update(grads, opt_state, trainable, lr=lr)``.
    """

    init: Callable[..., Any]
    update: Callable[..., Any]


class Updates(NamedTuple):
    """The result of `update` of a `Transform`."""

    updates: Tree  # `apply_updates` adds them to the trainable parameters
    opt_state: Any  # the new state, with the structure, shapes and dtypes of the old state


def zero_moments(trainable: Trainable) -> Tree:
    """Return zeros with the structure and shapes of the parameters.

    Each is in float32, or in the parameter's dtype if that is wider.
    """

    def zero(leaf: Tensor) -> Tensor:
        return torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32))

    moments: Tree = tree_map(zero, dict(trainable))
    return moments


def rate_of(lr: Rate | Mapping[str, Rate], name: str) -> Rate:
    """Return the learning rate of one parameter."""
    return plain_rate(lr[name] if isinstance(lr, Mapping) else lr)


def settings_of(lr: Rate | Mapping[str, Rate]) -> Callable[[str], tuple[Rate]]:
    """Return the learning rates as the `settings` of an elementwise formula."""
    if isinstance(lr, Mapping):
        return lambda name: (plain_rate(lr[name]),)
    setting = (plain_rate(lr),)
    return lambda _: setting


def check_transform(argument: str, value: Any) -> None:
    """Raise TypeError if a value does not have functions `init` and `update`."""
    if not (callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))):
        raise TypeError(f"`{argument}` is {described(value)}; pass a Transform, such as adamw()")


def check_update(grads: Any, trainable: Any, lr: Any) -> None:
    """Raise if the arguments of an update do not fit each other.

    Raises:
        TypeError: If a leaf is not a tensor or has an integer dtype, or if `lr` is not a real number.
        ValueError: If gradients do not have the names, types and shapes of the parameters. If `lr` is negative or not
            finite, or is a dict with other names.
    """
    check_trainable_with("grads", grads, trainable)
    check_rates("lr", lr, trainable)


def check_rates(argument: str, rate: Any, names: Collection[str], *, known: Collection[str] | None = None) -> None:
    """Raise if a value is neither a rate nor a dict of rates by name.

    Args:
        argument: The name of the argument, for error messages.
        rate: The rate, or the dict.
        names: The names that need a rate.
        known: The names that may have a rate. Default None means `names`.
    """
    if not isinstance(rate, Mapping):
        check_rate(argument, rate)
        return
    check_by_name(argument, rate, of="rates")
    if missing := [name for name in names if name not in rate]:
        raise ValueError(f"`{argument}` has no rate for {missing}; add one for each parameter")
    if unknown := [name for name in rate if name not in (names if known is None else known)]:
        raise ValueError(f"`{argument}` has a rate for {unknown}, which are not parameters; remove them")
    for name, value in rate.items():
        check_rate(argument, value, of=name)


def check_updates(argument: str, updates: Any, names: Collection[str]) -> None:
    """Raise ValueError if the updates of a wrapped optimizer have other names.

    They must be those of its parameters.
    """
    if torch.compiler.is_dynamo_compiling():
        return  # tracing a check takes as long as tracing an operation
    if not isinstance(updates, Mapping) or updates.keys() != set(names):
        found = sorted(updates) if isinstance(updates, Mapping) else described(updates)
        raise ValueError(f"`{argument}` returns updates for {found}; return one for each of {sorted(names)}")


def check_betas(betas: Any) -> tuple[float, float]:
    """Return a pair of decay rates in [0, 1) as Python numbers."""
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(f"`betas` is {described(betas)}; use a pair of numbers in [0, 1)")
    first, second = (check_number("betas", beta, least=0, below=1) for beta in betas)
    return first, second


def check_is_floating(argument: str, name: str, tensor: Tensor) -> None:
    """Raise ValueError for integers and booleans, which a product would round."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise ValueError(
            f"`{argument}` has a tensor of dtype {tensor.dtype} for {name!r}, which a product with a number would"
            " round; leave it out"
        )


def refuse_decay_of_factors(weight_decay: float, trainable: Trainable) -> None:
    """Raise ValueError if weight decay would be applied to factors.

    Decayed vectors leave and new vectors enter, so decaying factors does not decay the weight.
    """
    names = [name for name, leaf in trainable.items() if is_factors(leaf)] if weight_decay else []
    if names:
        raise ValueError(
            f"`weight_decay` is {weight_decay}, but it cannot decay the weight {names[0]!r} through its factors; "
            "use weight_decay=0 for factors, and decay weights with `dl.optim.decay(params, rate)` before the update"
        )


def apply_updates(trainable: Trainable, updates: Trainable) -> Tree:
    """Add updates to the trainable parameters.

    The result is ``trainable + updates``, with the structure, shapes and dtypes of `trainable`.

    Args:
        trainable: The trainable parameters by name, from `partition`.
        updates: The updates by name, from `update` of a `Transform`.

    Returns:
        The new trainable parameters by name.

    Raises:
        TypeError: If a leaf is not a tensor of a floating or complex dtype.
        ValueError: If names differ, or an update differs from its parameter in type, shape or device.

    Numerics: The sum is computed in the wider dtype of both, and rounded once to the parameter's dtype.

    Example:
        >>> import torch
        >>> apply_updates({"w": torch.ones(2)}, {"w": torch.tensor([0.5, -0.5])})
        {'w': tensor([1.5000, 0.5000])}
    """
    check_trainable_with("updates", updates, trainable)
    new: Tree = _updated(trainable, updates)
    return new


@elementwise()
def _updated(param: Any, update: Any) -> Any:
    return (param + update).to(param.dtype)
