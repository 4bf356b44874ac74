"""Apply an elementwise formula to many tensors in few operations, in eager mode.

Small tensors are joined in `Leaves` and large tensors are split into blocks, of limited size, so that temporaries stay
small.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import chain
from math import prod
from operator import attrgetter, itemgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dynlora_fn._core._batches import batches
from dynlora_fn._core._torch import are_immediate
from dynlora_fn.optim._leaves import FlatLeaves, Leaves

Row: TypeAlias = tuple[Any, ...]  # the arguments of a formula for one tensor of the result
Column: TypeAlias = Sequence[Any]  # the leaves of a tree

# The entries of a batch. On a CPU they should fit into its caches, on CUDA they should occupy the device.
_MOST_ON_CPU = 2**18
_MOST_ON_CUDA = 2**24


def in_batches(
    formula: Callable[..., Any],
    settings: Sequence[Row],
    columns: Sequence[Column],
    results: int,
    *,
    has_small: bool,
) -> list[Any] | None:
    """Apply a formula to rows of tensors, with one call for each batch of rows.

    A batch is a part of a group of limited size. Each column has one operand of every row, and the last column the
    small operands if there are any. The first column has the shapes of the result.

    Returns:
        A list for each result, or None if operations on the rows do not run at once.
    """
    groups = _groups(settings, columns)
    if groups is None:
        return None
    new: list[Any] = [[None] * len(settings) for _ in range(results)]
    sizes = [*map(Tensor.numel, columns[0])]
    for group in groups:
        most = _most(columns[0][group[0]])
        is_small = sum(map(sizes.__getitem__, group)) <= most
        for positions in [group] if is_small else batches(group, sizes.__getitem__, most=most):
            of_batch = _of_batch(formula, settings[positions[0]], columns, positions, has_small=has_small)
            by_result = list(of_batch) if results > 1 else [of_batch]
            if len(positions) == len(settings):
                return by_result
            for result, tensors in zip(new, by_result, strict=True):
                for position, tensor in zip(positions, tensors, strict=True):
                    result[position] = tensor
    return new


def _groups(settings: Sequence[Row], columns: Sequence[Column]) -> Iterable[Sequence[int]] | None:
    """Return the positions of rows with equal settings, dtypes and devices.

    Return None if operations on the rows do not run at once.
    """
    distinct = dict(zip(map(id, settings), settings, strict=True)).values()  # often one for all rows
    rates = [value for setting in distinct for value in setting if isinstance(value, Tensor)]
    if not are_immediate([*rates, *chain.from_iterable(columns)]):
        return None
    dtypes = [[*map(attrgetter("dtype"), column)] for column in columns]
    is_on_one_device = (
        all(map(attrgetter("is_cpu"), columns[0])) or len(set(map(attrgetter("device"), columns[0]))) == 1
    )
    if is_on_one_device and len(distinct) == 1 and all(len(set(column)) == 1 for column in dtypes):
        return [range(len(settings))]
    groups: dict[Hashable, list[int]] = defaultdict(list)
    keys = zip(map(_keys, settings), map(attrgetter("device"), columns[0]), *dtypes, strict=True)
    for position, key in enumerate(keys):
        groups[key].append(position)
    return groups.values()


def _of_batch(
    formula: Callable[..., Any],
    setting: Row,
    columns: Sequence[Column],
    positions: Sequence[int],
    *,
    has_small: bool,
) -> Any:
    """Return the results for one batch: a list of tensors, or a tuple of lists."""
    if len(positions) == 1:
        joined = _in_blocks(formula, (*setting, *(column[positions[0]] for column in columns)), len(setting))
        return tuple([part] for part in joined) if isinstance(joined, tuple) else [joined]
    batch = [itemgetter(*positions)(column) for column in columns]
    small = [FlatLeaves.of(batch.pop())] if has_small else []
    joined = formula(*setting, *map(Leaves, batch), *small)
    return tuple(part.tensors for part in joined) if isinstance(joined, tuple) else joined.tensors


def _keys(setting: Row) -> Hashable:
    return tuple(map(_key, setting))


def _key(setting: Any) -> Hashable:
    return id(setting) if isinstance(setting, Tensor) else setting


def _most(tensor: Tensor) -> int:
    return _MOST_ON_CPU if tensor.is_cpu else _MOST_ON_CUDA


def _in_blocks(formula: Callable[..., Any], row: Row, first: int) -> Any:
    """Apply a formula to one row, in blocks if its tensor is large."""
    like = row[first]
    if like.numel() <= _most(like):
        return formula(*row)
    new: list[Tensor] = []
    is_tuple = False
    for index in _blocks(tuple(like.shape), _most(like)):
        block = formula(*row[:first], *(_part(operand, like, index) for operand in row[first:]))
        is_tuple = isinstance(block, tuple)
        parts = block if is_tuple else (block,)
        new = new or [torch.empty_like(like, dtype=part.dtype) for part in parts]
        for whole, part in zip(new, parts, strict=True):
            whole[index] = part
    return tuple(new) if is_tuple else new[0]


def _blocks(shape: tuple[int, ...], most: int) -> Iterator[tuple[slice, ...]]:
    """Yield the indices of blocks of at most `most` entries, which cover a tensor."""
    if prod(shape) <= most or not shape:
        yield tuple(slice(None) for _ in shape)
        return
    step = max(1, most // prod(shape[1:]))
    for start in range(0, shape[0], step):
        for index in _blocks(shape[1:], most):
            yield (slice(start, start + step), *index)


def _part(operand: Tensor, like: Tensor, index: tuple[slice, ...]) -> Tensor:
    """Return the part of an operand for a block. Axes that are broadcast are not cut."""
    axes = range(like.ndim - operand.ndim, like.ndim)
    return operand[
        tuple(
            index[axis] if size == like.shape[axis] else slice(None)
            for axis, size in zip(axes, operand.shape, strict=True)
        )
    ]
