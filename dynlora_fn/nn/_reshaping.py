"""Views of a low-rank weight that stay low-rank: transposed, cut, or in heads. Single rows are plain tensors."""

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor

from dynlora_fn.nn._products import rows_of
from dynlora_fn.nn._view import View, matrix_shape, refuse, single, split_rows, take, transposed


def transpose(view: View, *dims: Any, **named: int) -> View:
    wanted = {dim % len(view.shape) for dim in (*dims, *named.values())}
    if view.kernel or (wanted or {0, 1}) != {len(view.shape) - 2, len(view.shape) - 1}:
        refuse(view, "transpose", f"dims {sorted(wanted)} of shape {view.shape}")
    return transposed(view)


def transpose_matrix(view: View) -> View:
    return transpose(view, 0, 1)


def transpose_last(view: View) -> View:
    return transpose(view, -2, -1)


def split(view: View, split_size: int | Sequence[int], dim: int = 0) -> tuple[View, ...]:
    size = view.shape[dim]
    if isinstance(split_size, int):
        split_size = [min(split_size, size - at) for at in range(0, size, split_size)]
    axis = dim if dim < 0 else dim - len(view.shape)
    if len(view.parts) > 1:
        sizes = [matrix_shape(part)[view.axis] for part in view.parts]
        if axis != view.axis or sum(split_size) != size:
            refuse(view, "split", f"axis {dim} of shape {view.shape}")
        return tuple(_span(view, sizes, at, at + own) for at, own in _spans(split_size))
    slices = [slice(at, at + own) for at, own in _spans(split_size)]
    index = (slice(None),) * (len(view.shape) + axis)
    pieces = [get_item(view, (*index, one)) for one in slices]
    return tuple(piece for piece in pieces if isinstance(piece, View))


def _spans(sizes: Sequence[int]) -> list[tuple[int, int]]:
    return [(sum(sizes[:number]), own) for number, own in enumerate(sizes)]


def _span(view: View, sizes: list[int], start: int, end: int) -> View:
    """Whole parts alone, from row or column `start` to `end`."""
    edges = [at for at, _ in _spans(sizes)] + [sum(sizes)]
    if start not in edges or end not in edges:
        refuse(view, "split", f"{start} to {end}, within one of its parts of {sizes}")
    return view._replace(parts=view.parts[edges.index(start) : edges.index(end)])


def chunk(view: View, chunks: int, dim: int = 0) -> tuple[View, ...]:
    return split(view, -(-view.shape[dim] // chunks), dim)


def unbind(view: View, dim: int = 0) -> tuple[Any, ...]:
    if dim % len(view.shape):
        refuse(view, "unbind", f"axis {dim}")
    return tuple(get_item(view, number) for number in range(view.shape[0]))


def get_item(view: View, index: Any) -> View | Tensor:
    """Of a stack its members, which stay low-rank, and so do slices of a matrix; single rows are plain tensors."""
    index = index if isinstance(index, tuple) else (index,)
    stack_axes = len(view.shape) - 2
    if len(index) > len(view.shape) or any(one is None or one is Ellipsis for one in index):
        refuse(view, "__getitem__", f"the index {index}")
    index = (*index, *[slice(None)] * (stack_axes + 2 - len(index)))
    stack, rows, columns = index[:stack_axes], index[-2], index[-1]
    is_whole = rows == slice(None) if isinstance(rows, slice) else False
    if view.kernel or (len(view.parts) > 1 and not (is_whole and columns == slice(None))):
        refuse(view, "__getitem__", f"the index {index}")
    if isinstance(rows, slice) and isinstance(columns, slice):
        return view._replace(parts=tuple(take(part, stack, rows, columns) for part in view.parts))
    if stack_axes or not isinstance(columns, slice):
        refuse(view, "__getitem__", f"the index {index}")
    low, base = rows_of(take(view.parts[0], (), slice(None), columns), rows)
    return base + low


def reshape(view: View, *shape: Any) -> View:
    """Rows in groups, such as the heads of attention: ``weight.view(heads, size, in)``."""
    shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
    part = single(view, "view")
    rows, columns = view.shape[-2:]
    if -1 in shape:
        known = -prod(shape)
        shape = tuple(rows * columns // known if size == -1 else size for size in shape)
    if len(view.shape) != 2 or shape[-1] != columns or prod(shape[:-1]) != rows:
        refuse(view, "view", f"shape {shape} of {view.shape}")
    return view._replace(parts=(split_rows(part, shape[:-1]),))


def unflatten(view: View, dim: int, sizes: Sequence[int]) -> View:
    if dim % len(view.shape) or len(view.shape) != 2:
        refuse(view, "unflatten", f"axis {dim} of shape {view.shape}")
    return reshape(view, *sizes, view.shape[-1])
