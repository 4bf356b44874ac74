"""`register_rule`: add a rule for an operation on low-rank weights."""

from collections.abc import Callable
from typing import Any

from dynlora_fn._core._tree import whole_factors
from dynlora_fn._core._types import Factors, LowRank
from dynlora_fn.nn._view import View, dense_base, refuse, single

REGISTERED: dict[Any, Callable[..., Any]] = {}


def register_rule(operation: Callable[..., Any], rule: Callable[..., Any]) -> None:
    """Let `call` use `rule` for an operation on low-rank weights.

    The rule applies to all later calls, for every model. It replaces a rule of the library or an earlier rule for the
    operation.

    Args:
        operation: The function as the model calls it, for example `torch.kron`. A method such as `torch.Tensor.kron` is
            another operation. The operation of a property is its getter, for example ``torch.Tensor.mH.__get__``.
        rule: A function that takes the arguments of the operation, with a `LowRank` in place of each low-rank weight.
            The alpha of this `LowRank` is 1, because another alpha is multiplied into `b`. The rule returns a tensor,
            a `LowRank` if the result is a low-rank weight, or a tuple of both. It returns `NotImplemented` for
            arguments that it does not cover.
            If it uses only plain operations, every transform differentiates it.

    Raises:
        TypeError: If the operation or the rule cannot be called.

    Example:
        >>> import torch
        >>> import dynlora_fn as dl
        >>> def row_sums(weight, dim=None):
        ...     if dim != 1:
        ...         return NotImplemented
        ...     b, a = weight.factors
        ...     return weight.base.sum(1) + b @ a.sum(1) / b.shape[1]
        >>> dl.nn.register_rule(torch.Tensor.sum, row_sums)
    """
    for argument, value in (("operation", operation), ("rule", rule)):
        if not callable(value):
            raise TypeError(f"`{argument}` is {value!r}, which cannot be called; pass a function")
    name = getattr(operation, "__name__", repr(operation))

    def on_views(*args: Any, **kwargs: Any) -> Any:
        views: list[View] = []
        arguments, named = _with_params((args, kwargs), name, views)
        result = rule(*arguments, **named)
        if result is NotImplemented:
            refuse(views[0], name, "these arguments")
        return _as_views(result, views[0])

    REGISTERED[operation] = on_views


def _as_views(result: Any, view: View) -> Any:
    """Return the result of a rule with a view in place of each `LowRank`."""
    if isinstance(result, LowRank):
        return view._replace(parts=(result,), scale=None)
    if type(result) in (tuple, list):
        return tuple(_as_views(element, view) for element in result)
    return result


def _with_params(value: Any, operation: str, views: list[View]) -> Any:
    """Return an argument, which may be nested, with a `LowRank` in place of each view.

    The views are appended to `views`.
    """
    if isinstance(value, View):
        views.append(value)
        return _as_param(value, operation)
    if type(value) in (tuple, list):
        return type(value)([_with_params(element, operation, views) for element in value])
    if type(value) is dict:
        return {key: _with_params(element, operation, views) for key, element in value.items()}
    return value


def _as_param(value: Any, operation: str) -> Any:
    """Return a view as one low-rank weight with an alpha of 1.

    Other values are returned unchanged, and a fused weight is refused.
    """
    if not isinstance(value, View):
        return value
    part = single(value, operation)
    if part.alpha != 1:
        b, a = whole_factors(part)
        part = part._replace(factors=Factors(b * part.alpha, a))
    if value.scale is None:
        return part
    b, a = whole_factors(part)
    return LowRank(dense_base(part) * value.scale, Factors(b * value.scale, a), part.seed)
