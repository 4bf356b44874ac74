"""Rules for views of a low-rank weight that stay low-rank: transposed, cut, or cut into heads.

Single rows become plain tensors.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from dynlora_fn.nn._embedding import rows_of
from dynlora_fn.nn._view import View, matrix_shape, refuse, single, split_rows, take, transposed


def transpose(view: View, *dims: Any, **named_dims: int) -> View:
    """Swap the rows and columns. Other axes cannot be swapped."""
    axes = {dim % len(view.shape) for dim in (*dims, *named_dims.values())}
    if view.kernel or (axes or {0, 1}) != {len(view.shape) - 2, len(view.shape) - 1}:
        refuse(view, "transpose", f"dims {sorted(axes)} of shape {view.shape}")
    return transposed(view)


def transpose_matrix(view: View) -> View:
    return transpose(view, 0, 1)


def transpose_last(view: View) -> View:
    return transpose(view, -2, -1)


def split(view: View, split_size: int | Sequence[int], dim: int = 0) -> tuple[View, ...]:
    """Cut the weight along any axis. A fused weight is cut only between its parts."""
    size = view.shape[dim]
    if isinstance(split_size, int):
        split_size = [min(split_size, size - start) for start in range(0, size, split_size)]
    axis = dim if dim < 0 else dim - len(view.shape)
    if len(view.parts) > 1:
        sizes = [matrix_shape(part)[view.axis] for part in view.parts]
        if axis != view.axis or sum(split_size) != size:
            refuse(view, "split", f"axis {dim} of shape {view.shape}")
        return tuple(_span(view, sizes, start, start + length) for start, length in _spans(split_size))
    slices = [slice(start, start + length) for start, length in _spans(split_size)]
    index = (slice(None),) * (len(view.shape) + axis)
    pieces = [get_item(view, (*index, rows_or_columns)) for rows_or_columns in slices]
    return tuple(piece for piece in pieces if isinstance(piece, View))


def _spans(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Return the start and the length of adjacent pieces of these sizes."""
    return [(sum(sizes[:position]), length) for position, length in enumerate(sizes)]


def _span(view: View, sizes: list[int], start: int, end: int) -> View:
    """Return the parts from row or column `start` to `end`, which must not cut through a part."""
    edges = [first for first, _ in _spans(sizes)] + [sum(sizes)]
    if start not in edges or end not in edges:
        refuse(view, "split", f"{start} to {end}, within one of its parts of {sizes}")
    return view._replace(parts=view.parts[edges.index(start) : edges.index(end)])


def chunk(view: View, chunks: int, dim: int = 0) -> tuple[View, ...]:
    """Cut the weight into `chunks` pieces, as `split` does."""
    return split(view, -(-view.shape[dim] // chunks), dim)


def unbind(view: View, dim: int = 0) -> tuple[Any, ...]:
    """Return the members of a stack, or the rows of a matrix."""
    if dim % len(view.shape):
        refuse(view, "unbind", f"axis {dim}")
    return tuple(get_item(view, member) for member in range(view.shape[0]))


def get_item(view: View, index: Any) -> View | Tensor:
    """Return members of a stack or slices of a matrix as low-rank weights, and single rows as plain tensors."""
    index = index if isinstance(index, tuple) else (index,)
    stack_axes = len(view.shape) - 2
    if len(index) > len(view.shape) or any(entry is None or entry is Ellipsis for entry in index):
        refuse(view, "__getitem__", f"the index {index}")
    index = (*index, *[slice(None)] * (stack_axes + 2 - len(index)))
    stack, rows, columns = index[:stack_axes], index[-2], index[-1]
    takes_all_rows = rows == slice(None) if isinstance(rows, slice) else False
    if view.kernel or (len(view.parts) > 1 and not (takes_all_rows and columns == slice(None))):
        refuse(view, "__getitem__", f"the index {index}")
    if isinstance(rows, slice) and isinstance(columns, slice):
        return view._replace(parts=tuple(take(part, stack, rows, columns) for part in view.parts))
    if stack_axes or not isinstance(columns, slice):
        refuse(view, "__getitem__", f"the index {index}")
    low_rank_rows, base_rows = rows_of(take(view.parts[0], (), slice(None), columns), rows)
    return base_rows + low_rank_rows


def reshape(view: View, *shape: Any) -> View:
    """Group the rows, for example into attention heads: ``weight.view(heads, size, in)``."""
    shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
    part = single(view, "view")
    rows, columns = view.shape[-2:]
    if -1 in shape:
        known_size = -prod(shape)
        shape = tuple(rows * columns // known_size if size == -1 else size for size in shape)
    if len(view.shape) != 2 or shape[-1] != columns or prod(shape[:-1]) != rows:
        refuse(view, "view", f"shape {shape} of {view.shape}")
    return view._replace(parts=(split_rows(part, shape[:-1]),))


def unflatten(view: View, dim: int, sizes: Sequence[int]) -> View:
    """Group the rows, as `reshape` does."""
    if dim % len(view.shape) or len(view.shape) != 2:
        refuse(view, "unflatten", f"axis {dim} of shape {view.shape}")
    return reshape(view, *sizes, view.shape[-1])


RESHAPING_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((torch.transpose, torch.swapaxes, Tensor.transpose, Tensor.swapaxes), transpose),
    **dict.fromkeys((torch.t, Tensor.t, Tensor.T.__get__), transpose_matrix),  # type: ignore[attr-defined]
    Tensor.mT.__get__: transpose_last,  # type: ignore[attr-defined]
    **dict.fromkeys((torch.split, Tensor.split), split),
    **dict.fromkeys((torch.chunk, Tensor.chunk), chunk),
    **dict.fromkeys((torch.unbind, Tensor.unbind), unbind),
    Tensor.__getitem__: get_item,
    **dict.fromkeys((torch.reshape, Tensor.reshape, Tensor.view), reshape),
    **dict.fromkeys((torch.unflatten, Tensor.unflatten), unflatten),
}
# Methods of `Tensor` that are written in Python, by name: Dynamo looks them up with `__get__`, as it does properties.
METHODS: dict[str, Callable[..., Any]] = {"split": split, "unflatten": unflatten}
