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
            a `LowRank` if the result is a low-rank weight, or `NotImplemented` for arguments that it does not cover.
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
        views = [value for value in (*args, *kwargs.values()) if isinstance(value, View)]
        if not views:
            return NotImplemented
        named = {keyword: _as_param(value, name) for keyword, value in kwargs.items()}
        result = rule(*[_as_param(value, name) for value in args], **named)
        if result is NotImplemented:
            refuse(views[0], name, "these arguments")
        return views[0]._replace(parts=(result,), scale=None) if isinstance(result, LowRank) else result

    REGISTERED[operation] = on_views


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
