"""Apply an elementwise formula to all tensors of trees, in few operations.

Trees are by parameter name. In eager mode, small tensors are joined in `Leaves` and large tensors are split into
blocks, of limited size, so that temporaries stay small. If operations are traced or differentiated, the formula is
applied to each tensor in turn.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dynlora_fn._core._batches import batches
from dynlora_fn._core._torch import are_immediate
from dynlora_fn._core._types import Factors, is_factors, sides_of, with_sides
from dynlora_fn.optim._formulas import FORMULAS, Formula, key_of
from dynlora_fn.optim._leaves import FlatLeaves, Leaves

# The entries of a batch. On a CPU they should fit into its caches, on CUDA they should occupy the device.
_MOST_ON_CPU = 2**18
_MOST_ON_CUDA = 2**24

_Row: TypeAlias = tuple[Any, ...]  # the arguments of a formula for one tensor of the result
_Column: TypeAlias = Sequence[Any]  # the leaves of a tree


def elementwise(*, results: int = 1, can_join: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that makes a function of trees from an elementwise formula.

    The formula is called as ``formula(*settings, *operands, *small)``, for one tensor or for joined tensors. It may use
    the operations of `Leaves` on its operands, and the operations of `FlatLeaves` on `small`. Its result must have the
    shape of the first operand.

    The decorated function is called as ``function(tree, *others, small=None, settings=None)``. `tree` and `others` are
    full-rank tensors or factors by name. `small` is such a tree too, but its tensors have few entries, for example
    counts. `settings` maps a name to a tuple of numbers or 0-d tensors. The result is a tree with the structure of
    `tree`.

    Args:
        results: The number of results of the formula. If it is larger than 1, the function returns a tuple of trees.
        can_join: Whether the formula uses only operations of `Leaves` and `FlatLeaves`.
    """

    def decorate(formula: Callable[..., Any]) -> Callable[..., Any]:
        key = key_of(formula)
        FORMULAS[key] = Formula(formula, results, can_join)

        def function(
            tree: Mapping[str, Any],
            *others: Mapping[str, Any],
            small: Mapping[str, Any] | None = None,
            settings: Callable[[str], tuple[Any, ...]] | None = None,
        ) -> Any:
            trees = [tree, *others, *([] if small is None else [small])]
            columns = [[each[name] for name in tree] for each in trees]
            options = [() if settings is None else settings(name) for name in tree]
            if tree:
                new = (_apply_in_graph if _is_traced(columns[0]) else _apply)(key, columns, options, small is not None)
            else:
                new = [[]] * results
            found = [dict(zip(tree, column, strict=True)) for column in new]
            return found[0] if results == 1 else tuple(found)

        return function

    return decorate


# With `allow_in_graph`, AOTAutograd traces both functions instead of Dynamo, which takes longer.
@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _apply_in_graph(key: str, columns: Sequence[_Column], options: Sequence[_Row], has_small: bool) -> list[_Column]:
    return _apply(key, columns, options, has_small)


def _apply(key: str, columns: Sequence[_Column], options: Sequence[_Row], has_small: bool) -> list[_Column]:
    formula, results, can_join = FORMULAS[key]
    rows = _rows(columns, options)
    if can_join and are_immediate([operand for row in rows for operand in row if isinstance(operand, Tensor)]):
        new = _in_batches(formula, rows, len(columns) - has_small, has_small=has_small)
    else:
        new = _in_turn(key, rows)
    by_result = [new] if results == 1 else [[row[index] for row in new] for index in range(results)]
    return [_rebuilt(columns[0], tensors) for tensors in by_result]


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _in_turn(key: str, rows: Sequence[_Row]) -> list[Any]:
    return [FORMULAS[key].function(*row) for row in rows]


def _is_traced(column: _Column) -> bool:
    """Return whether Dynamo traces and can pass the leaves to a function in the graph.

    It cannot pass leaves with constants, such as sharded factors.
    """
    others = [leaf for leaf in column if not isinstance(leaf, Tensor | Factors)]
    return torch.compiler.is_dynamo_compiling() and not others


def _rows(columns: Sequence[_Column], options: Sequence[_Row]) -> list[_Row]:
    rows: list[_Row] = []
    for setting, *operands in zip(options, *columns, strict=True):
        if is_factors(operands[0]):
            rows += [(*setting, *sides) for sides in zip(*map(sides_of, operands), strict=True)]
        else:
            rows.append((*setting, *operands))
    return rows


def _rebuilt(column: _Column, results: Sequence[Tensor]) -> _Column:
    """Return leaves with the structure of `column` and other tensors."""
    following = iter(results)
    new: list[Any] = []
    for leaf in column:
        if is_factors(leaf):
            new.append(with_sides(leaf, [next(following) for _ in sides_of(leaf)]))
        else:
            new.append(next(following))
    return new


def _in_batches(formula: Callable[..., Any], rows: Sequence[_Row], operands: int, *, has_small: bool) -> list[Any]:
    """Apply a formula to rows of tensors, with one call for each batch of rows.

    A row has settings, then `operands` tensors, then the small tensor if there is one. The first operand has the shape
    of the result.
    """
    results: dict[int, Any] = {}
    first = len(rows[0]) - operands - has_small if rows else 0
    for positions in _batches(rows, first):
        batch = [rows[position] for position in positions]
        if len(batch) == 1:
            results[positions[0]] = _in_blocks(formula, batch[0], first)
            continue
        columns = [*zip(*batch, strict=True)]
        leaves = [Leaves(column) for column in columns[first : first + operands]]
        small = [FlatLeaves.of(column) for column in columns[first + operands :]]
        joined = formula(*batch[0][:first], *leaves, *small)
        if isinstance(joined, tuple):
            each: Any = zip(*(result.tensors for result in joined), strict=True)
        else:
            each = joined.tensors
        results.update(zip(positions, each, strict=True))
    return [results[position] for position in range(len(rows))]


def _batches(rows: Sequence[_Row], first: int) -> Iterator[list[int]]:
    """Yield the positions of rows that form one batch.

    Its rows have equal settings, dtypes and devices, and a limited size in total.
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for position, row in enumerate(rows):
        groups[(*map(_key, row[:first]), row[first].device, *[tensor.dtype for tensor in row[first:]])].append(position)
    for positions in groups.values():
        most = _most(rows[positions[0]][first])
        yield from batches(positions, lambda position: rows[position][first].numel(), most=most)


def _key(setting: Any) -> Hashable:
    return id(setting) if isinstance(setting, Tensor) else setting


def _most(tensor: Tensor) -> int:
    return _MOST_ON_CPU if tensor.is_cpu else _MOST_ON_CUDA


def _in_blocks(formula: Callable[..., Any], row: _Row, first: int) -> Any:
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
