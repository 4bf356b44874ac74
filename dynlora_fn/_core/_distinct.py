"""Find the leaves of trees that differ in type, shape, dtype or device.

A model has hundreds of weights of few shapes. A check of one weight takes as long as a small operation, so only the
first weight of each kind is checked. Nothing is remembered between calls.
"""

from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from dynlora_fn._core._types import Alpha, Factors, FrozenTensor, LowRank, ScaledFactors

_PLAIN = frozenset((Tensor, nn.Parameter))
_RECORDS = frozenset((Factors, ScaledFactors, LowRank, FrozenTensor))  # their fields are compared one by one


def distinct_names(tree: Mapping[str, Any], *others: Mapping[str, Any]) -> Collection[str]:
    """Return the names whose leaves a check must read, in the order of `tree`.

    A name is left out if an earlier name has leaves of the same types, shapes, dtypes, devices and alphas in every
    tree. A check that reads nothing else gives the same result for both names. Leaves of other types than plain
    tensors, such as tensor subclasses and quantized bases, are never left out.

    Args:
        tree: Leaves by name.
        *others: Further trees, which have every name of `tree`.
    """
    if torch.compiler.is_dynamo_compiling():
        return tree.keys()  # tracing this function takes longer than tracing a check
    names = list(tree)
    columns = [list(tree.values()), *([other[name] for name in names] for other in others)]
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for position, kinds in enumerate(zip(*(map(type, column) for column in columns), strict=True)):
        groups[kinds].append(position)
    chosen: list[int] = []
    for positions in groups.values():
        chosen += _first_of_each(positions, [[column[position] for position in positions] for column in columns])
    return [names[position] for position in sorted(chosen)]


def _first_of_each(positions: Sequence[int], columns: Iterable[Sequence[Any]]) -> Iterable[int]:
    """Return the first position of each combination of leaves, or all positions."""
    features: list[Iterator[Hashable]] = []
    for column in columns:
        found = _features(column[::-1])
        if found is None:
            return positions
        features += found
    try:
        # Later entries replace earlier ones, so the positions are in reverse.
        return dict(zip(zip(*features, strict=True), reversed(positions), strict=True)).values()
    except (TypeError, RuntimeError):  # a symbolic size has no hash, and a nested tensor has no shape
        return positions


def _features(column: Sequence[Any]) -> list[Iterator[Hashable]] | None:
    """Return what checks read of some leaves of one type, or None for another type.

    Each iterator has an entry for each leaf.
    """
    kinds = set(map(type, column))
    if kinds <= _PLAIN:
        shared = [attrgetter("shape")]
        shared += [attrgetter("dtype")] if len(set(map(attrgetter("dtype"), column))) > 1 else []
        shared += [] if all(map(attrgetter("is_cpu"), column)) else [attrgetter("device")]
        return [map(read, column) for read in shared]  # what all leaves share distinguishes none of them
    if len(kinds) > 1 or not kinds <= _RECORDS:
        return [iter(column)] if kinds == {Alpha} else None
    features: list[Iterator[Hashable]] = []
    for field in zip(*column, strict=True):
        found = _features(field)
        if found is None:
            return None
        features += found
    return features
