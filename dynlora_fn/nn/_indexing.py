"""Rules for indexing and splitting a low-rank weight.

Pieces stay low-rank. Single rows and columns become plain tensors.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dynlora_fn._core._types import LowRank
from dynlora_fn.nn._embedding import rows_of
from dynlora_fn.nn._reshaping import reshape
from dynlora_fn.nn._view import ROWS, View, matrix_shape, refuse, take, transposed


def split(view: View, split_size: int | Sequence[int], dim: int = 0) -> tuple[View, ...]:
    """Split the weight along any axis, but a fused weight only between its parts."""
    size = view.shape[dim]
    if isinstance(split_size, int):
        if split_size < 1:
            refuse(view, "split", f"size {split_size}")
        split_size = [min(split_size, size - start) for start in range(0, size, split_size)]
    axis = dim if dim < 0 else dim - len(view.shape)
    if len(view.parts) > 1:
        if axis != view.axis or sum(split_size) != size:
            refuse(view, "split", f"axis {dim} of shape {view.shape}")
        return tuple(_span(view, "split", start, start + length) for start, length in _spans(split_size))
    if sum(split_size) != size:
        refuse(view, "split", f"sizes {split_size} of axis {dim} of shape {view.shape}")
    slices = [slice(start, start + length) for start, length in _spans(split_size)]
    index = (slice(None),) * (len(view.shape) + axis)
    pieces = [get_item(view, (*index, rows_or_columns)) for rows_or_columns in slices]
    return tuple(piece for piece in pieces if isinstance(piece, View))


def _spans(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Return start and length of each of some adjacent pieces with these sizes."""
    return [(sum(sizes[:position]), length) for position, length in enumerate(sizes)]


def _span(view: View, operation: str, start: int, end: int) -> View:
    """Return the parts of a fused weight from row or column `start` to `end`.

    Neither end may be inside a part.
    """
    sizes = [matrix_shape(part)[view.axis] for part in view.parts]
    edges = [first for first, _ in _spans(sizes)] + [sum(sizes)]
    if start not in edges or end not in edges:
        refuse(view, operation, f"{start} to {end}, within one of its parts of {sizes}")
    return view._replace(parts=view.parts[edges.index(start) : edges.index(end)])


def chunk(view: View, chunks: int, dim: int = 0) -> tuple[View, ...]:
    """Split the weight into at most `chunks` pieces, as `torch.chunk` does."""
    if chunks < 1:
        refuse(view, "chunk", f"{chunks} chunks")
    return split(view, -(-view.shape[dim] // chunks), dim)


def unbind(view: View, dim: int = 0) -> tuple[Any, ...]:
    """Return the members of a stack, or the rows of a matrix."""
    if dim not in (0, -len(view.shape)):
        refuse(view, "unbind", f"axis {dim}")
    return tuple(get_item(view, member) for member in range(view.shape[0]))


def get_item(view: View, index: Any) -> View | Tensor:
    """Return members of a stack or slices of a matrix as low-rank weights.

    A single column is returned as a tensor, and so are rows that an integer, a list or a tensor selects.
    """
    index = _one_per_axis(view, index if isinstance(index, tuple) else (index,))
    if any(entry is None for entry in index):
        return _with_new_axes(view, index)
    if view.kernel:
        return _of_kernel(view, index)
    stack, rows, columns = index[:-2], index[-2], index[-1]
    if len(view.parts) > 1:
        return _of_parts(view, index)
    (part,) = view.parts
    if isinstance(rows, slice) and isinstance(columns, slice):
        cut = view._replace(parts=(take(part, stack, rows, columns),))
        if 0 in cut.shape:
            refuse(view, "__getitem__", f"the index {index}, which leaves nothing")
        return cut
    if not stack and isinstance(columns, slice):
        return _rows(view, take(part, (), slice(None), columns), rows)
    if not stack and isinstance(rows, slice) and type(columns) is int:
        cut = transposed(view._replace(parts=(take(part, (), rows, slice(None)),)))
        return _rows(view, cut.parts[0], columns)
    refuse(view, "__getitem__", f"the index {index}")


def _one_per_axis(view: View, index: tuple[Any, ...]) -> tuple[Any, ...]:
    """Complete an index, so that it has an entry for each axis and each new axis."""
    index = tuple(list(entry) if isinstance(entry, tuple | range) else entry for entry in index)
    if any(isinstance(entry, list) and not all(isinstance(element, int) for element in entry) for entry in index):
        refuse(view, "__getitem__", f"the index {index}")  # torch takes a list of lists for a tuple
    if any(isinstance(entry, bool) or (_is_mask(entry) and entry.ndim != 1) for entry in index):
        refuse(view, "__getitem__", "a flag, or a mask over several axes")
    taken = sum(entry is not None and entry is not Ellipsis for entry in index)
    missing = (slice(None),) * (len(view.shape) - taken)
    ellipses = [position for position, entry in enumerate(index) if entry is Ellipsis]
    if taken > len(view.shape) or len(ellipses) > 1:
        refuse(view, "__getitem__", f"the index {index}")
    if not ellipses:
        return (*index, *missing)
    return (*index[: ellipses[0]], *missing, *index[ellipses[0] + 1 :])


def _is_mask(entry: Any) -> bool:
    return isinstance(entry, Tensor) and entry.dtype in (torch.bool, torch.uint8)


def _with_new_axes(view: View, index: tuple[Any, ...]) -> View:
    cut = get_item(view, tuple(entry for entry in index if entry is not None))
    if not isinstance(cut, View) or not all(entry is None or isinstance(entry, slice) for entry in index):
        refuse(view, "__getitem__", f"the index {index}")
    sizes = list(cut.shape)
    return reshape(cut, *(1 if entry is None else sizes.pop(0) for entry in index))


def _of_kernel(view: View, index: tuple[Any, ...]) -> View:
    """Return some output channels of a convolution's weight, or drop axes of size 1."""
    rows, *others = index
    sizes = view.shape[1:]
    is_dropped = [type(entry) is int and size == 1 for entry, size in zip(others, sizes, strict=True)]
    is_kept = [isinstance(entry, slice) and entry == slice(None) for entry in others]
    covered = [dropped or kept for dropped, kept in zip(is_dropped, is_kept, strict=True)]
    if (
        not isinstance(rows, slice)
        or not all(covered)
        or any(entry not in (0, -1) for entry in others if type(entry) is int)
    ):
        refuse(view, "__getitem__", f"the index {index}")
    cut = view._replace(parts=(take(view.parts[0], (), rows, slice(None)),))
    remaining = [size for size, dropped in zip(sizes, is_dropped, strict=True) if not dropped]
    return reshape(cut, cut.shape[0], *remaining)


def _of_parts(view: View, index: tuple[Any, ...]) -> View:
    """Return members of a stack of fused weights, or adjacent parts."""
    along, across = (index[-2], index[-1]) if view.axis == ROWS else (index[-1], index[-2])
    if not isinstance(along, slice) or not isinstance(across, slice) or across != slice(None):
        refuse(view, "__getitem__", f"the index {index}")
    picked = range(view.shape[view.axis])[along]  # `slice.indices` stops Dynamo of torch 2.11
    if picked.step != 1:
        refuse(view, "__getitem__", f"the index {index}")
    span = view if along == slice(None) else _span(view, "__getitem__", picked.start, picked.stop)
    return span._replace(parts=tuple(take(part, index[:-2], slice(None), slice(None)) for part in span.parts))


def _rows(view: View, part: LowRank, index: Any) -> Tensor:
    return rows_of(view, part, index)


def _at(view: View, dim: int, entry: Any) -> View | Tensor:
    return get_item(view, (*[slice(None)] * (dim % len(view.shape)), entry))


def select(view: View, dim: int, index: Any) -> View | Tensor:
    """Return one member, row or column, as `torch.select` does."""
    return _at(view, dim, index)


def index_select(view: View, dim: int, index: Tensor) -> View | Tensor:
    """Return several members or rows, as `torch.index_select` does."""
    return _at(view, dim, index.reshape(-1))


def narrow(view: View, dim: int, start: Any, length: int) -> View | Tensor:
    """Return a slice along one axis, as `torch.narrow` does."""
    size = view.shape[dim]
    if not isinstance(start, Tensor):
        start = start + size if start < 0 else start
        if start < 0 or length < 0 or start + length > size:
            refuse(view, "narrow", f"{length} from {start} of {size}")
    return _at(view, dim, slice(start, start + length))


INDEXING_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((torch.split, Tensor.split), split),
    **dict.fromkeys((torch.chunk, Tensor.chunk), chunk),
    **dict.fromkeys((torch.unbind, Tensor.unbind), unbind),
    Tensor.__getitem__: get_item,
    **dict.fromkeys((torch.select, Tensor.select), select),
    **dict.fromkeys((torch.index_select, Tensor.index_select), index_select),
    **dict.fromkeys((torch.narrow, Tensor.narrow), narrow),
}
