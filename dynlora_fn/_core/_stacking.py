"""Stack repeated weights of one shape in one tensor, and unstack them.

``layers.0.q.weight``, ``layers.1.q.weight``, ... become ``layers.*.q.weight`` with a leading axis for each star.
Graph size, compile time and the number of kernels of an update or a switch then do not depend on the model's depth.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from itertools import product
from math import prod
from typing import NamedTuple

from dynlora_fn._core._check_trees import check_params
from dynlora_fn._core._torch import tree_flatten, tree_unflatten
from dynlora_fn._core._types import LowRank, Param, Params


class Stack(NamedTuple):
    """The names of the parameters that form one stack."""

    members: list[str]  # in row-major order
    shape: tuple[int, ...]  # the leading axes; () for a parameter that is not stacked


def find_stacks(keys: Mapping[str, Hashable]) -> dict[str, Stack]:
    """Group names that differ only in integers into stacks.

    Every name is in exactly one stack. Names form a stack if their keys are equal and their integers form a full grid
    that starts at zero.

    Args:
        keys: The key of each name, such as a shape. Only names with equal keys are stacked.

    Returns:
        The stacks by name, with a star for each integer that varies.

    Raises:
        ValueError: If a name contains a star.

    Example:
        >>> stacks = find_stacks({"layers.0.w": "8x8", "layers.1.w": "8x8", "head": "8x8"})
        >>> stacks["layers.*.w"], stacks["head"]
        (Stack(members=['layers.0.w', 'layers.1.w'], shape=(2,)), Stack(members=['head'], shape=()))
    """
    for name in keys:
        if "*" in name:
            raise ValueError(f"parameter {name!r} contains a star, which stands for the axis of a stack; rename it")
    return dict(_group(list(keys), keys, literal=0))


def _group(names: list[str], keys: Mapping[str, Hashable], literal: int) -> Iterator[tuple[str, Stack]]:
    """Replace all integers after the first `literal` by stars.

    Where the replaced integers form no grid, one more is kept.

    A grid contains index zero, so at most one group of a pattern is a grid and no two stacks share a name.
    """
    groups: dict[tuple[str, Hashable], list[str]] = defaultdict(list)
    for name in names:
        groups[_starred(name, literal), keys[name]].append(name)
    for (pattern, _), members in groups.items():
        shape = _grid_shape([_integers(name)[literal:] for name in members])
        if "*" not in pattern:
            yield from ((name, Stack([name], ())) for name in members)
        elif shape is not None and len(members) > 1:
            yield pattern, Stack(sorted(members, key=_integers), shape)
        else:
            yield from _group(members, keys, literal + 1)


def _integers(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".") if _is_integer(part))


def _is_integer(part: str) -> bool:
    """Return whether `unstack` would write the same text: no leading zero."""
    return part.isascii() and part.isdecimal() and str(int(part)) == part


def _starred(name: str, literal: int) -> str:
    parts, integers = name.split("."), 0
    for at, part in enumerate(parts):
        if _is_integer(part):
            integers += 1
            parts[at] = "*" if integers > literal else part
    return ".".join(parts)


def _grid_shape(indices: list[tuple[int, ...]]) -> tuple[int, ...] | None:
    shape = tuple(max(column) + 1 for column in zip(*indices, strict=True))
    is_grid = len(indices) == prod(shape) and set(indices) == set(product(*map(range, shape)))
    return shape if is_grid else None


def unstack(params: Params) -> dict[str, Param]:
    """Return each weight of every stack under its name in the model.

    The results are views of the stacks, so nothing is copied. The backward pass is one stack operation for each stack.
    Only the number of views in the graph grows with the depth of the model.

    Args:
        params: The parameters by name, with a star in a name for each leading axis.

    Returns:
        The parameters by name, without leading axes.

    Raises:
        TypeError: If a value is neither a weight nor a tensor.
        ValueError: If a parameter has fewer leading axes than its name has stars.

    Example:
        >>> import torch
        >>> list(unstack({"layers.*.bias": torch.zeros(2, 8), "head": torch.zeros(3)}))
        ['layers.0.bias', 'layers.1.bias', 'head']
    """
    check_params("params", params)
    for pattern, param in params.items():
        _check_axes(pattern, param)
    return {name: member for pattern, param in params.items() for name, member in _members(pattern, param)}


def _check_axes(pattern: str, param: Param) -> None:
    """Raise if a parameter has fewer leading axes than its name has stars."""
    axes = param.seed.ndim if isinstance(param, LowRank) else param.ndim
    if pattern.split(".").count("*") > axes:
        raise ValueError(
            f"`params` has {pattern!r} of shape {tuple(param.shape)}, which has no axis for each star in the name; "
            "rename it, or stack its members"
        )


def _members(pattern: str, param: Param) -> Iterator[tuple[str, Param]]:
    parts = pattern.split(".")
    if "*" not in parts:  # a star within a part is a letter
        yield pattern, param
        return
    at = parts.index("*")
    for index, member in enumerate(unbind(param)):
        yield from _members(".".join([*parts[:at], str(index), *parts[at + 1 :]]), member)


def unbind(param: Param) -> list[Param]:
    """Split a stack along its first axis into views."""
    if not isinstance(param, LowRank):
        return list(param.unbind())
    leaves, structure = tree_flatten(param)
    return [tree_unflatten(member, structure) for member in zip(*(leaf.unbind() for leaf in leaves), strict=True)]
