"""Rules for attributes, casts and multiples of a weight."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dynlora_fn._core._torch import tree_leaves, tree_map
from dynlora_fn.nn._view import View, refuse

# --- what a module reads; `Weight` has these attributes, but no memory


def _strides(view: View, dim: int | None = None) -> Any:
    """Return the strides of a contiguous tensor of this shape.

    The dense weight that operations without a rule get is contiguous.
    """
    strides = [1]
    for size in view.shape[:0:-1]:
        strides.insert(0, strides[0] * size)
    return tuple(strides) if dim is None else strides[dim]


def _is_contiguous(view: View, memory_format: Any = torch.contiguous_format) -> bool:
    return memory_format is torch.contiguous_format


def _requires_grad(view: View) -> bool:
    """Return whether a tensor of the weight requires a gradient.

    The tensor that replaces the weight does not know this inside `torch.func.grad`.
    """
    leaves = [leaf for leaf in tree_leaves(view) if isinstance(leaf, Tensor)]
    if torch.compiler.is_dynamo_compiling():  # Dynamo returns the right value only for a view
        leaves = [leaf.view_as(leaf) for leaf in leaves]
    return any(leaf.requires_grad for leaf in leaves)


def _describe(view: View, **_: Any) -> str:
    return f"LowRankWeight({view.name!r}, shape={tuple(view.shape)}, dtype={view.dtype}, device={view.device})"


def _placeholder(value: Any) -> Any:
    """Return an expanded 0-d tensor with the shape, dtype and device of a weight.

    Other values are returned unchanged.
    """
    if isinstance(value, View):
        return value.parts[0].factors.b.detach().new_empty(()).expand(value.shape)
    return value


def _reads_attributes(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Return the rule for an operation that reads only shape, dtype and device."""

    def rule(*args: Any, **kwargs: Any) -> Any:
        named = {name: _placeholder(value) for name, value in kwargs.items()}
        return operation(*[_placeholder(value) for value in args], **named)

    return rule


# --- casts


def cast(view: View, dtype: torch.dtype) -> View:
    """Cast the factors.

    The base stays in its storage format, and products read it in the dtype of their input.
    """
    if dtype == view.dtype:
        return view
    if dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        refuse(view, "to", f"dtype {dtype}")
    parts = [part._replace(factors=_cast_factors(part.factors, dtype)) for part in view.parts]
    return view._replace(parts=tuple(parts), read_dtype=None)


def _cast_factors(factors: Any, dtype: torch.dtype) -> Any:
    return factors._replace(b=factors.b.to(dtype), a=factors.a.to(dtype))


def _move(view: View, device: Any) -> View:
    if torch.device(device) == view.device:
        return view
    return view._replace(parts=tree_map(lambda leaf: leaf.to(device), view.parts))


def to(input: Any, *args: Any, **kwargs: Any) -> Any:
    """Cast or move the weight, or cast and move a tensor like the weight."""
    if not isinstance(input, View):
        return _reads_attributes(Tensor.to)(input, *args, **kwargs)
    device, dtype, other = kwargs.get("device"), kwargs.get("dtype"), kwargs.get("other")
    for value in args:
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, str | torch.device) or type(value) is int:
            device = value
        elif isinstance(value, Tensor | View):
            other = value
    if other is not None:
        device, dtype = other.device, other.dtype
    view = input if dtype is None else cast(input, dtype)
    return view if device is None else _move(view, device)


def type_as(input: Any, other: Any) -> Any:
    """Cast a tensor or a weight to the dtype of `other`."""
    return to(input, other)


def _type(view: View, dtype: Any = None, *_: Any, **__: Any) -> Any:
    if dtype is None:
        return Tensor.type(_placeholder(view))
    if not isinstance(dtype, torch.dtype):
        refuse(view, "type", f"dtype {dtype!r}")
    return cast(view, dtype)


def _casts_to(dtype: torch.dtype) -> Callable[..., View]:
    return lambda view, memory_format=None: cast(view, dtype)


def _detach(view: View) -> View:
    scale = view.scale.detach() if isinstance(view.scale, Tensor) else view.scale
    return view._replace(parts=tree_map(Tensor.detach, view.parts), scale=scale)


def _unchanged(view: View, **_: Any) -> View:
    return view


def _contiguous(view: View, memory_format: Any = torch.contiguous_format) -> View:
    return view


# --- multiples


def multiply(input: Any, other: Any) -> View:
    """Return the product of the weight and a Python number or a 0-d tensor.

    A 0-d tensor gets its gradient.
    """
    view, factor = (input, other) if isinstance(input, View) else (other, input)
    if not _is_scalar(factor):
        refuse(view, "mul", "a tensor")
    return view._replace(scale=factor if view.scale is None else view.scale * factor)


def divide(input: Any, other: Any, *, rounding_mode: str | None = None) -> View:
    """Return the weight divided by a Python number or a 0-d tensor."""
    view = input if isinstance(input, View) else other
    if view is other or rounding_mode or not _is_scalar(other):
        refuse(view, "div", "a tensor or a rounding mode")
    if not isinstance(other, Tensor) and other == 0:
        refuse(view, "div", "zero")
    return multiply(view, 1 / other)


def _is_scalar(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0 and not value.is_complex()
    return isinstance(value, int | float)


def _negative(view: View) -> View:
    return multiply(view, -1)


_LIKE = ["zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like", "result_type"]
_NEW = ["new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "get_device"]
_MULTIPLY = (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__)
_DIVIDE = (torch.div, torch.divide, torch.true_divide, Tensor.div, Tensor.divide, Tensor.true_divide)
_NEGATIVE = (torch.neg, torch.negative, Tensor.neg, Tensor.negative, Tensor.__neg__)

ATTRIBUTE_RULES: dict[Any, Callable[..., Any]] = {
    Tensor.stride: _strides,
    Tensor.is_contiguous: _is_contiguous,
    Tensor.storage_offset: lambda view: 0,
    Tensor.requires_grad.__get__: _requires_grad,  # type: ignore[attr-defined]
    Tensor.__len__: lambda view: view.shape[0],
    Tensor.__repr__: _describe,
    Tensor.__format__: lambda view, form: format(_describe(view), form),
    **{getattr(torch, name): _reads_attributes(getattr(torch, name)) for name in _LIKE},
    **{getattr(Tensor, name): _reads_attributes(getattr(Tensor, name)) for name in _NEW},
    Tensor.to: to,
    Tensor.type_as: type_as,
    Tensor.type: _type,
    Tensor.float: _casts_to(torch.float32),
    Tensor.double: _casts_to(torch.float64),
    Tensor.half: _casts_to(torch.float16),
    Tensor.bfloat16: _casts_to(torch.bfloat16),
    Tensor.cpu: lambda view, memory_format=None: _move(view, "cpu"),
    **dict.fromkeys((torch.detach, Tensor.detach, Tensor.data.__get__), _detach),  # type: ignore[attr-defined]
    Tensor.contiguous: _contiguous,
    **dict.fromkeys((torch.positive, Tensor.positive, Tensor.__pos__), _unchanged),
    **dict.fromkeys(_MULTIPLY, multiply),
    **dict.fromkeys((*_DIVIDE, Tensor.__truediv__), divide),
    **dict.fromkeys(_NEGATIVE, _negative),
}

_PROPERTIES = (
    *("shape", "dtype", "device", "ndim", "layout", "itemsize", "nbytes", "is_leaf"),
    *("grad", "grad_fn", "output_nr", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_nested", "is_quantized"),
)
_METHODS = (
    *("size", "dim", "ndimension", "numel", "nelement", "element_size", "__hash__"),
    *("is_floating_point", "is_complex", "is_signed", "is_conj", "is_neg", "is_inference"),
)
# Attributes and methods that `Weight` has like any tensor, so they need no rule.
METADATA: set[Any] = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
    *(getattr(Tensor, name) for name in _METHODS),
    *(torch.numel, torch.is_floating_point, torch.is_complex, torch.is_signed, torch.is_conj, torch.is_neg),
}
