"""Weights of one shape that repeat, in one tensor: ``layers.0.q.weight``, ``layers.1.q.weight``, ... become
``layers.*.q.weight`` with a leading axis for each star.

Graphs, compile time and the number of kernels of an update or a switch are then independent of a model's depth.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from itertools import product
from math import prod
from typing import NamedTuple

from dynlora_fn._core._torch import tree_flatten, tree_unflatten
from dynlora_fn._core._types import LowRank, Param, Params


class Stack(NamedTuple):
    members: list[str]  # in row-major order
    shape: tuple[int, ...]  # of the leading axes; () for a parameter that stands alone


def find_stacks(keys: Mapping[str, Hashable]) -> dict[str, Stack]:
    """Names with equal keys that differ in whole numbers alone, where the numbers form a full grid from zero.

    Example:
        >>> stacks = find_stacks({"layers.0.w": "8x8", "layers.1.w": "8x8", "head": "8x8"})
        >>> stacks["layers.*.w"], stacks["head"]
        (Stack(members=['layers.0.w', 'layers.1.w'], shape=(2,)), Stack(members=['head'], shape=()))
    """
    return dict(_group(list(keys), keys, literal=0))


def _group(names: list[str], keys: Mapping[str, Hashable], literal: int) -> Iterator[tuple[str, Stack]]:
    """Stars for all numbers but the first `literal`; where they form no grid, one more is kept as it is.

    A grid holds index zero, so that at most one group of a pattern is one and no two stacks share a name.
    """
    groups: dict[tuple[str, Hashable], list[str]] = defaultdict(list)
    for name in names:
        groups[_starred(name, literal), keys[name]].append(name)
    for (pattern, _), members in groups.items():
        shape = _grid_shape([_numbers(name)[literal:] for name in members])
        if "*" not in pattern:
            yield from ((name, Stack([name], ())) for name in members)
        elif shape is not None and len(members) > 1:
            yield pattern, Stack(sorted(members, key=_numbers), shape)
        else:
            yield from _group(members, keys, literal + 1)


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".") if _is_number(part))


def _is_number(part: str) -> bool:
    """Whether it is what its number is written as: not so with a zero in front, since `unstack` writes it again."""
    return part.isascii() and part.isdecimal() and str(int(part)) == part


def _starred(name: str, literal: int) -> str:
    parts, numbers = name.split("."), 0
    for at, part in enumerate(parts):
        if _is_number(part):
            numbers += 1
            parts[at] = "*" if numbers > literal else part
    return ".".join(parts)


def _grid_shape(indices: list[tuple[int, ...]]) -> tuple[int, ...] | None:
    shape = tuple(max(column) + 1 for column in zip(*indices, strict=True))
    is_grid = len(indices) == prod(shape) and set(indices) == set(product(*map(range, shape)))
    return shape if is_grid else None


def unstack(params: Params) -> dict[str, Param]:
    """Every weight under its own name: views of the stacks, nothing is copied.

    The backward of this is one stack for each parameter, and the graph grows with depth by views alone.
    """
    return {name: member for pattern, param in params.items() for name, member in _members(pattern, param)}


def _members(pattern: str, param: Param) -> Iterator[tuple[str, Param]]:
    if "*" not in pattern:
        yield pattern, param
        return
    for number, member in enumerate(unbind(param)):
        yield from _members(pattern.replace("*", str(number), 1), member)


def unbind(param: Param) -> list[Param]:
    """The members along the first axis of the stack, as views."""
    if not isinstance(param, LowRank):
        return list(param.unbind())
    leaves, structure = tree_flatten(param)
    return [tree_unflatten(member, structure) for member in zip(*(leaf.unbind() for leaf in leaves), strict=True)]
