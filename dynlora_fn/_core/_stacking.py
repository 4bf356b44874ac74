"""Stack repeated weights of one shape in one tensor, and unstack them.

``layers.0.q.weight``, ``layers.1.q.weight``, ... become ``layers.*.q.weight`` with a leading axis for each star. If the
numbers do not start at zero, the name contains a range in shell notation instead of a star: ``{1..8}.q.weight``.

Graph size, compile time and the number of kernels of an update or a switch then do not depend on the model's depth.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from torch import Tensor

from dynlora_fn._core._check_trees import check_params
from dynlora_fn._core._torch import tree_leaves
from dynlora_fn._core._types import LowRank, Param, Params


class Stack(NamedTuple):
    """The names of the parameters in one stack, and the shape of its leading axes."""

    members: list[str]  # in row-major order
    shape: tuple[int, ...]  # the leading axes; () for a parameter that is not stacked


def find_stacks(keys: Mapping[str, Hashable], kinds: Mapping[str, object] | None = None) -> dict[str, Stack]:
    """Group names that differ only in integers into stacks.

    Every name is in exactly one stack. Names form a stack if their keys are equal and their integers form a full grid.
    If the integers have gaps, each run of consecutive integers forms a stack.

    Args:
        keys: The key of each name, such as a shape. Only names with equal keys are stacked.
        kinds: The kind of each name, such as the type of its module. Names whose grid does not start at zero are
            stacked only if their kinds are equal too. Default None means that all names have the same kind.

    Returns:
        The stacks by name. A name has a star for an axis of integers that starts at zero, and a range such as
        ``{1..8}`` for an axis that starts at another integer.

    Raises:
        ValueError: If a name contains a star or a range.

    Example:
        >>> stacks = find_stacks({"layers.0.w": "8x8", "layers.1.w": "8x8", "head": "8x8"})
        >>> stacks["layers.*.w"], stacks["head"]
        (Stack(members=['layers.0.w', 'layers.1.w'], shape=(2,)), Stack(members=['head'], shape=()))
        >>> list(find_stacks({"0.w": "9x8", "1.w": "8x8", "2.w": "8x8"}))
        ['0.w', '{1..2}.w']
    """
    for name in keys:
        if "*" in name or _first_axis(name):
            what = "a star" if "*" in name else "a range"
            raise ValueError(f"parameter {name!r} contains {what}, which means the axis of a stack; rename it")
    finer = {name: (key, kinds[name] if kinds else None) for name, key in keys.items()}
    return dict(_group(list(keys), keys, finer, frozenset()))


def _group(
    names: list[str], keys: Mapping[str, Hashable], finer: Mapping[str, Hashable], literal: frozenset[int]
) -> Iterator[tuple[str, Stack]]:
    """Yield the stacks of some names, with an axis for each integer not in `literal`.

    `literal` has the positions of the integers that stay in the name. If the integers of a group do not form a full
    grid, the first integer becomes literal. If a grid does not start at zero, its names are grouped by the finer keys.
    If an axis has gaps, each of its runs is grouped again.

    Two stacks cannot have the same name. Both would contain the parameter with the first index of each axis, and every
    parameter is in one stack.
    """
    groups: dict[tuple[str, Hashable], list[str]] = defaultdict(list)
    for name in names:
        groups[_starred(name, literal), keys[name]].append(name)
    for members in groups.values():
        if len(members) == 1:
            yield members[0], Stack(members, ())
            continue
        columns = list(zip(*map(_integers, members), strict=True))
        values = {at: sorted(set(column)) for at, column in enumerate(columns) if at not in literal}
        gap = next((at for at, axis in values.items() if len(_runs(axis)) > 1), None)
        if len(members) < prod(map(len, values.values())):
            yield from _group(members, keys, finer, literal | {min(values)})
        elif keys is not finer and any(axis != list(range(len(axis))) for axis in values.values()):
            yield from _group(members, finer, finer, literal)
        elif gap is not None:
            runs = _runs(values[gap])
            run_of = {index: at for at, run in enumerate(runs) for index in run}
            by_run: list[list[str]] = [[] for _ in runs]
            for name, index in zip(members, columns[gap], strict=True):
                by_run[run_of[index]].append(name)
            for run, of_run in zip(runs, by_run, strict=True):
                yield from _group(of_run, keys, finer, literal | {gap} if len(run) == 1 else literal)
        else:
            yield _named(members, values)


def _named(members: list[str], values: Mapping[int, list[int]]) -> tuple[str, Stack]:
    """Return the name and the stack of members that form a full grid.

    `values` has the sorted integers at each position that is not literal.
    """
    axes = {at: _axis_name(axis) for at, axis in values.items()}
    shape = tuple(len(axis) for at, axis in values.items() if not _is_integer(axes[at]))
    return _replaced(members[0], axes), Stack(sorted(members, key=_integers), shape)


def _axis_name(values: list[int]) -> str:
    first, last = values[0], values[-1]
    if first == 0:
        return "*"
    return str(first) if first == last else f"{{{first}..{last}}}"


def _runs(values: list[int]) -> list[list[int]]:
    """Split sorted integers at their gaps."""
    runs: list[list[int]] = []
    for value in values:
        if not runs or value > runs[-1][-1] + 1:
            runs.append([])
        runs[-1].append(value)
    return runs


def _integers(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".") if _is_integer(part))


def _is_integer(part: str) -> bool:
    """Return whether a part is an integer that `unstack` writes the same way.

    A part with a leading zero is not.
    """
    return part.isascii() and part.isdecimal() and str(int(part)) == part


def _starred(name: str, literal: frozenset[int]) -> str:
    return _replaced(name, {at: "*" for at in range(len(_integers(name))) if at not in literal})


def _replaced(name: str, texts: Mapping[int, str]) -> str:
    """Replace integers of a name by texts. Position k is the k-th integer of the name."""
    parts, position = name.split("."), 0
    for at, part in enumerate(parts):
        if _is_integer(part):
            parts[at] = texts.get(position, part)
            position += 1
    return ".".join(parts)


def unstack(params: Params) -> dict[str, Param]:
    """Return each weight of every stack under its name in the model.

    The results are views of the stacks, so nothing is copied. The backward pass has one stack operation for each stack.
    With the depth of the model, only the number of views in the graph grows.

    Args:
        params: The parameters by name, with a star or a range in a name for each leading axis.

    Returns:
        The parameters by name, without leading axes.

    Raises:
        TypeError: If a value is neither a weight nor a tensor.
        ValueError: If a parameter has fewer leading axes than its name has stars and ranges, or a weight has
            an entry by its name and is in a stack.

    Example:
        >>> import torch
        >>> list(unstack({"layers.*.bias": torch.zeros(2, 8), "head": torch.zeros(3)}))
        ['layers.0.bias', 'layers.1.bias', 'head']
        >>> list(unstack({"{1..2}.bias": torch.zeros(2, 8)}))
        ['1.bias', '2.bias']
    """
    check_params("params", params)
    return unstacked(params)


def unstacked(params: Params) -> dict[str, Param]:
    """Return `unstack(params)` of parameters that were checked before."""
    for pattern, param in params.items():
        if _may_be_stack(pattern):
            _check_axes(pattern, param)
    members: dict[str, Param] = {}
    for pattern, param in params.items():
        for name, member in _members(pattern, param) if _may_be_stack(pattern) else ((pattern, param),):
            if name in members:
                raise ValueError(
                    f"`params` has {name!r} by its name and in a stack, and one would be ignored; remove one of "
                    "them, or make the parameters with `init(..., stack=False)`"
                )
            members[name] = member
    return members


def _check_axes(pattern: str, param: Param) -> None:
    """Raise ValueError if a parameter has fewer leading axes than its name."""
    if _first_axis(pattern) is None:
        return
    axes = param.seed.ndim if isinstance(param, LowRank) else len(param.shape)
    if (count := count_axes(pattern)) > axes:
        raise ValueError(
            f"`params` has {pattern!r} of shape {tuple(param.shape)}, with {axes} leading axes for {count} stars or "
            "ranges in the name; rename it, or stack its members"
        )


def count_axes(name: str) -> int:
    """Return the number of stack axes that a name has."""
    count = 0
    while axis := _first_axis(name):
        name, count = f"{axis[0]}{axis[1]}{axis[2]}", count + 1
    return count


def _members(pattern: str, param: Param) -> Iterator[tuple[str, Param]]:
    axis = _first_axis(pattern)
    if axis is None:
        yield pattern, param
        return
    before, first, after = axis
    for index, member in enumerate(unbind(param), first):
        yield from _members(f"{before}{index}{after}", member)


def member_names(pattern: str, shape: Sequence[int]) -> list[str]:
    """Return the names of the members of a stack, in row-major order.

    Args:
        pattern: The name of the stack. A name without a star or range is its only member.
        shape: The shape of the stack. Only its leading axes are read.
    """
    axis = _first_axis(pattern)
    if axis is None:
        return [pattern]
    before, first, after = axis
    indices = range(first, first + shape[0])
    return [name for index in indices for name in member_names(f"{before}{index}{after}", shape[1:])]


def _may_be_stack(name: str) -> bool:
    return "*" in name or "{" in name


def _first_axis(name: str) -> tuple[str, int, str] | None:
    """Return the text before the first star or range, its first index, the text after."""
    if not _may_be_stack(name):
        return None
    parted = f".{name}."  # position `at` here is the dot before position `at` in the name
    star, brace = parted.find(".*."), parted.find(".{")
    while brace >= 0 and (star < 0 or brace < star):
        end = name.find("}", brace) + 1
        first, dots, last = name[brace + 1 : end - 1].partition("..")
        if end and parted[end + 1] == "." and dots and _is_integer(first) and _is_integer(last):
            return name[:brace], int(first), name[end:]
        brace = parted.find(".{", brace + 1)
    return None if star < 0 else (name[:star], 0, name[star + 1 :])


def unbind(param: Param) -> list[Param]:
    """Split a stack along its first axis into views."""
    if isinstance(param, Tensor):
        return list(param.unbind())
    return _unbind_tuple(param, len(tree_leaves(param)[0]))


def _unbind_tuple(node: Any, count: int) -> list[Any]:
    """Return the members of a tuple of stacks.

    `tree_unflatten` takes Dynamo four times as many instructions.
    """
    columns = [_unbind_child(child, count) for child in node]
    rows = zip(*columns, strict=True) if columns else [()] * count
    return [type(node)(*row) for row in rows] if hasattr(node, "_fields") else [*rows]


def _unbind_child(child: Any, count: int) -> Sequence[Any]:
    if isinstance(child, Tensor):
        return child.unbind()
    return _unbind_tuple(child, count) if isinstance(child, tuple) else [child] * count  # a constant
