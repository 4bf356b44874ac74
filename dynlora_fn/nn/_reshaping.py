"""Rules that transpose a low-rank weight, change its shape, or add axes.

The result stays low-rank, so a new shape must not mix rows and columns. For example, `(heads, size, in)` is a stack,
and `(out, in, *kernel)` is the weight of a convolution. `_indexing.py` has the rules for pieces of a weight.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from dynlora_fn._core._tree import whole_factors
from dynlora_fn._core._types import LowRank
from dynlora_fn.nn._view import (
    ROWS,
    View,
    dense_base,
    matrix_shape,
    refuse,
    single,
    split_rows,
    transposed,
    unbind_last,
)

# --- axes in another order


def permute(view: View, *dims: Any) -> View:
    """Swap rows and columns, or reorder the axes of a stack."""
    order = [dim % len(view.shape) for dim in _sizes(dims)]
    same = list(range(len(view.shape)))
    if order == same:
        return view
    stack, matrix = order[:-2], order[-2:]
    if view.kernel or sorted(matrix) != same[-2:] or sorted(stack) != same[:-2]:
        refuse(view, "permute", f"dims {order} of shape {view.shape}")
    if stack != same[:-2]:
        view = view._replace(parts=(_permute_stack(single(view, "permute"), stack),))
    return view if matrix == same[-2:] else transposed(view)


def _permute_stack(part: LowRank, order: list[int]) -> LowRank:
    b, a = (leaf.permute(*order, -2, -1) for leaf in whole_factors(part))
    base = dense_base(part).permute(*order, -2, -1)
    return LowRank(base, part.factors._replace(b=b, a=a), part.seed.permute(order))


def transpose(view: View, dim0: int, dim1: int) -> View:
    """Swap rows and columns, or two axes of a stack."""
    order = list(range(len(view.shape)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return permute(view, order)


def swapaxes(view: View, axis0: int, axis1: int) -> View:
    """Swap two axes, as `transpose` does."""
    return transpose(view, axis0, axis1)


def transpose_matrix(view: View) -> View:
    return transpose(view, 0, 1) if len(view.shape) == 2 else permute(view, list(range(len(view.shape)))[::-1])


def transpose_last(view: View) -> View:
    return transpose(view, -2, -1)


def movedim(view: View, source: int | Sequence[int], destination: int | Sequence[int]) -> View:
    """Move axes to other positions."""
    sources, destinations = ([dims] if isinstance(dims, int) else list(dims) for dims in (source, destination))
    axes = len(view.shape)
    moved = {to % axes: axis % axes for axis, to in zip(sources, destinations, strict=True)}
    staying = [axis for axis in range(axes) if axis not in moved.values()]
    return permute(view, [moved[axis] if axis in moved else staying.pop(0) for axis in range(axes)])


# --- axes of other sizes


def _sizes(shape: Sequence[Any]) -> tuple[Any, ...]:
    """Return sizes or dims as a tuple, from several arguments or from one sequence."""
    return tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int | torch.dtype) else tuple(shape)


def reshape(view: View, *shape: Any) -> View:
    """Split rows into heads or columns into a kernel, or reshape the axes of a stack."""
    shape = _sizes(shape)
    if not all(isinstance(size, int) for size in shape):
        refuse(view, "view", f"{shape}")
    if -1 in shape:
        known_size = -prod(shape)
        shape = tuple(prod(view.shape) // known_size if size == -1 else size for size in shape)
    if shape == view.shape:
        return view
    if len(view.parts) > 1 or prod(shape) != prod(view.shape) or len(shape) < 2:
        refuse(view, "view", f"shape {shape} of {view.shape}")
    (part,) = view.parts
    *stack, rows, columns = matrix_shape(part)
    if stack and shape[-2:] == (rows, columns):
        return view._replace(parts=(_in_stack(part, shape[:-2], reshape=True),))
    if stack and shape == (prod(stack) * rows, columns):
        return view._replace(parts=unbind_last(_in_stack(part, (prod(stack),), reshape=True)), axis=ROWS)
    if not stack and shape[-1] == columns:
        return view._replace(parts=(split_rows(part, shape[:-1]),), kernel=())
    if not stack and shape[0] == rows:
        return view._replace(kernel=shape[2:])
    refuse(view, "view", f"shape {shape} of {view.shape}")


def _in_stack(part: LowRank, stack: Sequence[int], *, reshape: bool) -> LowRank:
    """Reshape the axes of a stack, or repeat a weight along new axes of a stack."""
    b, a = whole_factors(part)
    change = Tensor.reshape if reshape else Tensor.expand
    base, b, a = (change(leaf, (*stack, *leaf.shape[-2:])) for leaf in (dense_base(part), b, a))
    return LowRank(base, part.factors._replace(b=b, a=a), change(part.seed, tuple(stack)))


def unflatten(view: View, dim: int, sizes: Sequence[int]) -> View:
    """Split an axis, as `reshape` does."""
    dim = dim % len(view.shape)
    return reshape(view, *view.shape[:dim], *sizes, *view.shape[dim + 1 :])


def flatten(view: View, start_dim: int = 0, end_dim: int = -1) -> View:
    """Join axes, as `reshape` does."""
    start, end = start_dim % len(view.shape), end_dim % len(view.shape) + 1
    return reshape(view, *view.shape[:start], prod(view.shape[start:end]), *view.shape[end:])


def squeeze(view: View, dim: Any = None) -> View:
    """Remove axes of size 1, as `reshape` does."""
    dims = range(len(view.shape)) if dim is None else [dim] if isinstance(dim, int) else dim
    removed = {axis % len(view.shape) for axis in dims}
    return reshape(view, *(size for axis, size in enumerate(view.shape) if size != 1 or axis not in removed))


def unsqueeze(view: View, dim: int) -> View:
    """Add an axis of size 1, as `reshape` does."""
    shape = list(view.shape)
    shape.insert(dim % (len(shape) + 1), 1)
    return reshape(view, *shape)


def expand(view: View, *shape: Any) -> View:
    """Repeat the weight along axes of a stack."""
    shape = _sizes(shape)
    padded = (*(1 for _ in range(len(shape) - len(view.shape))), *view.shape)
    shape = tuple(old if size == -1 else size for old, size in zip(padded, shape, strict=True))
    part = single(view, "expand")
    if shape[-2:] != view.shape[-2:]:
        refuse(view, "expand", f"shape {shape} of {view.shape}")
    return view if shape == view.shape else view._replace(parts=(_in_stack(part, shape[:-2], reshape=False),))


def _as_shape_of(rule: Callable[..., View]) -> Callable[..., Any]:
    """Return the rule for a method that uses the shape of another tensor."""

    def shaped(input: Any, other: Any) -> Any:
        if isinstance(input, View):
            return rule(input, *other.shape)
        return getattr(input, rule.__name__)(other.shape)

    return shaped


RESHAPING_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((torch.transpose, torch.swapdims, Tensor.transpose, Tensor.swapdims), transpose),
    **dict.fromkeys((torch.swapaxes, Tensor.swapaxes), swapaxes),
    **dict.fromkeys((torch.t, Tensor.t, Tensor.T.__get__), transpose_matrix),  # type: ignore[attr-defined]
    **dict.fromkeys((torch.adjoint, Tensor.adjoint), transpose_last),
    **dict.fromkeys([getattr(Tensor, name).__get__ for name in ("mT", "H", "mH")], transpose_last),
    **dict.fromkeys((torch.permute, Tensor.permute), permute),
    **dict.fromkeys((torch.movedim, torch.moveaxis, Tensor.movedim, Tensor.moveaxis), movedim),
    **dict.fromkeys((torch.reshape, Tensor.reshape, Tensor.view), reshape),
    **dict.fromkeys((Tensor.view_as, Tensor.reshape_as), _as_shape_of(reshape)),
    **dict.fromkeys((torch.unflatten, Tensor.unflatten), unflatten),
    **dict.fromkeys((torch.flatten, Tensor.flatten), flatten),
    **dict.fromkeys((torch.squeeze, Tensor.squeeze), squeeze),
    **dict.fromkeys((torch.unsqueeze, Tensor.unsqueeze), unsqueeze),
    **dict.fromkeys((Tensor.expand, torch.broadcast_to, Tensor.broadcast_to), expand),
    Tensor.expand_as: _as_shape_of(expand),
}
