"""Apply an elementwise formula to all tensors of trees, in few operations.

Trees are by parameter name. In eager mode, the formula is applied in batches (see `_in_batches`). If operations are
traced or differentiated, it is applied to each tensor in turn.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from dynlora_fn._core._types import Factors, is_factors, sides_of, with_sides
from dynlora_fn.optim._formulas import FORMULAS, Formula, key_of
from dynlora_fn.optim._in_batches import Column, Row, in_batches


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
def _apply_in_graph(key: str, columns: Sequence[Column], options: Sequence[Row], has_small: bool) -> list[Column]:
    return _apply(key, columns, options, has_small)


def _apply(key: str, columns: Sequence[Column], options: Sequence[Row], has_small: bool) -> list[Column]:
    formula, results, can_join = FORMULAS[key]
    by_result = None
    if can_join and not torch.compiler.is_compiling():
        sides, settings = [_flattened(column, columns[0]) for column in columns], _repeated(options, columns[0])
        by_result = in_batches(formula, settings, sides, results, has_small=has_small)
    if by_result is None:
        new = _in_turn(key, _rows(columns, options))
        by_result = [new] if results == 1 else [[row[index] for row in new] for index in range(results)]
    return [_rebuilt(columns[0], tensors) for tensors in by_result]


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _in_turn(key: str, rows: Sequence[Row]) -> list[Any]:
    return [FORMULAS[key].function(*row) for row in rows]


def _is_traced(column: Column) -> bool:
    """Return whether Dynamo traces and can pass the leaves to a function in the graph.

    It cannot pass leaves with constants, such as sharded factors.
    """
    return torch.compiler.is_dynamo_compiling() and not [
        leaf for leaf in column if not isinstance(leaf, Tensor | Factors)
    ]


def _rows(columns: Sequence[Column], options: Sequence[Row]) -> list[Row]:
    rows: list[Row] = []
    for setting, *operands in zip(options, *columns, strict=True):
        if is_factors(operands[0]):
            rows += [(*setting, *sides) for sides in zip(*map(sides_of, operands), strict=True)]
        else:
            rows.append((*setting, *operands))
    return rows


def _flattened(column: Column, like: Column) -> list[Any]:
    """Return the tensors of leaves, in order. The leaves have the structure of `like`."""
    if set(map(type, chain(column, like))) == {Factors}:
        return [*chain.from_iterable(column)]
    flat: list[Any] = []
    for leaf, structure in zip(column, like, strict=True):
        flat += sides_of(leaf) if is_factors(structure) else (leaf,)
    return flat


def _repeated(options: Sequence[Row], like: Column) -> list[Row]:
    """Return the settings of each tensor of the leaves."""
    if set(map(type, like)) == {Factors}:
        return [*chain.from_iterable(zip(options, options, strict=True))]
    repeated: list[Row] = []
    for setting, leaf in zip(options, like, strict=True):
        repeated += [setting] * (len(sides_of(leaf)) if is_factors(leaf) else 1)
    return repeated


def _rebuilt(column: Column, results: Sequence[Tensor]) -> Column:
    """Return leaves with the structure of `column` and other tensors."""
    following = iter(results)
    if not torch.compiler.is_compiling() and set(map(type, column)) == {Factors}:  # faster than the loop
        return [*map(Factors, following, following)]
    new: list[Any] = []
    for leaf in column:
        if is_factors(leaf):
            new.append(with_sides(leaf, [next(following) for _ in sides_of(leaf)]))
        else:
            new.append(next(following))
    return new
