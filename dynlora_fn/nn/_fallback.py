"""The dense weight for operations without a rule, with a warning.

Operations whose effect on the dense weight would be lost are always refused.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from inspect import signature
from types import FunctionType
from typing import Any, Never

import torch
from torch import Tensor
from torch.nn import functional

from dynlora_fn._core._dtypes import autocast_now, widest, without_autocast
from dynlora_fn._core._torch import OpOverload, OpOverloadPacket
from dynlora_fn._core._tree import whole_factors
from dynlora_fn._core._types import LowRank, alpha_of, divisor_of
from dynlora_fn.bases._base import as_base
from dynlora_fn.nn._view import NoRuleError, View, gathered


def dense_weight(view: View) -> Tensor:
    """Return the dense weight in the shape and dtype that the module reads.

    It is computed with plain operations, so gradients reach the factors under every transform.
    """
    view = gathered(view)
    parts = [_dense_part(part) for part in view.parts]
    weight = parts[0] if len(parts) == 1 else torch.cat(parts, dim=view.axis)
    weight = weight.reshape(view.shape) if view.kernel else weight
    weight = weight if view.scale is None else weight * view.scale
    return weight if weight.dtype == view.dtype else weight.to(view.dtype)


def _dense_part(part: LowRank) -> Tensor:
    b, a = whole_factors(part)
    base = part.base if isinstance(part.base, Tensor) else as_base(part.base).as_tensor(widest(b.dtype))
    return (_sum_in_graph if torch.compiler.is_dynamo_compiling() else _sum)(base, b, a, alpha_of(part.factors))


# With `allow_in_graph`, AOTAutograd traces this function instead of Dynamo, which takes longer for each operation.
@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _sum_in_graph(base: Tensor, b: Tensor, a: Tensor, alpha: float) -> Tensor:
    return _sum(base, b, a, alpha)


def _sum(base: Tensor, b: Tensor, a: Tensor, alpha: float) -> Tensor:
    """Return the dense weight."""
    dtype = widest(b.dtype, base.dtype)
    divisor = divisor_of(b.shape[-1], alpha)
    # No conversion to the same dtype, so that the weight is one node of a graph.
    base, b, a = (leaf if leaf.dtype == dtype else leaf.to(dtype) for leaf in (base, b, a))
    autocast = autocast_now(b.device.type)
    with without_autocast(b.device.type) if autocast and autocast.enabled else nullcontext():
        if b.ndim == 2:
            return torch.addmm(base, b, a, alpha=1 / divisor)
        return base + b @ a / divisor


def permit(view: View, operation: str, refusal: NoRuleError) -> None:
    """Raise, warn, or call a function before a dense weight is formed, by `fallback`."""
    if view.fallback == "raise":
        raise refusal
    if view.fallback == "dense":
        _warn_once(view.name, operation)
    else:
        view.fallback(view.name, operation)


_SAID: set[tuple[str, str]] = set()


# Dynamo cannot trace a warning, but calls a function with this decorator while it traces.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _warn_once(name: str, operation: str) -> None:
    if (name, operation) in _SAID:
        return
    warnings.warn(
        f"low-rank weight {name!r} is made dense for `{operation}`, which has no rule for this use. Values and "
        "gradients are right, but take the memory and time of a dense weight. Exclude the weight from `targets`, add a "
        "rule with `dl.nn.register_rule`, or pass fallback='raise' to `call` to get an error",
        stacklevel=6,  # the line of the model
    )
    _SAID.add((name, operation))  # after the warning, which a filter may turn into an error


# --- operations whose effect on a temporary dense weight would be lost


def refuse_lost(view: View, operation: str, reason: str) -> Never:
    """Raise for an operation whose effect on a temporary dense weight would be lost."""
    raise NotImplementedError(
        f"low-rank weight {view.name!r} is used in `{operation}`, which {reason}; compute a new tensor instead, or "
        "exclude the weight from `targets`"
    )


def why_lost(
    func: Any, operation: str, args: Sequence[Any], kwargs: Mapping[str, Any], has_weight: Callable[[Any], bool]
) -> str | None:
    """Return why the effect of an operation on a temporary weight would be lost.

    Return None if it would not be lost.
    """
    is_first = has_weight(args[0] if len(args) > 0 else list(kwargs.values())[:1])
    is_differentiated_by = func is torch.autograd.grad and has_weight(args[1] if len(args) > 1 else kwargs["inputs"])
    if (is_first and operation in _BOUND) or is_differentiated_by:
        return "needs its memory or its place in the autograd graph"
    if getattr(func, "__name__", "") in ("__set__", "__delete__"):
        return "changes it in place"
    is_in_place = operation in _IN_PLACE or (operation.endswith("_") and not operation.endswith("__"))
    name, position = _IN_PLACE_ARGUMENTS.get(func, ("inplace", len(args)))
    is_requested = bool(args[position] if position < len(args) else kwargs.get(name))
    is_written = [has_weight(args[at] if at < len(args) else kwargs.get(name)) for at, name in _written(func)]
    if is_requested or (is_first and is_in_place) or has_weight(kwargs.get("out")) or any(is_written):
        return "changes it in place"
    return None


# Dynamo cannot trace schemas, but calls a function with this decorator while it traces.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _written(func: Any) -> list[tuple[int, str]]:
    """Return position and name of each argument that an operator changes in place.

    Only operators with a schema are checked.
    """
    if isinstance(func, OpOverload):
        overloads = [func]
    elif isinstance(func, OpOverloadPacket):
        overloads = [getattr(func, name) for name in func.overloads()]  # type: ignore[no-untyped-call]
    else:
        return []
    return [
        (position, argument.name)
        for overload in overloads
        for position, argument in enumerate(overload._schema.arguments)
        if argument.is_write
    ]


_IN_PLACE = {
    *("__setitem__", "__delitem__", "__iadd__", "__isub__", "__imul__", "__imatmul__", "__itruediv__", "__idiv__"),
    *("__ifloordiv__", "__imod__", "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"),
}
_BOUND = {
    *("data_ptr", "storage", "untyped_storage", "as_strided", "__cuda_array_interface__"),
    *("backward", "register_hook", "register_post_accumulate_grad_hook", "retain_grad"),
}
# Functions that change a tensor in place if an argument is passed: the name and position of that argument.
_IN_PLACE_ARGUMENTS: dict[Any, tuple[str, int]] = {
    function: (name, list(signature(function).parameters).index(name))
    for function in vars(functional).values()
    for name in ("inplace", "max_norm")
    if isinstance(function, FunctionType) and name in signature(function).parameters
}
