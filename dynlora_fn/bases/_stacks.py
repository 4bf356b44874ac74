"""Split a stack of bases into its members, and stack members again."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from math import prod

import torch

from dynlora_fn._core._torch import are_immediate, tree_flatten, tree_leaves, tree_map, tree_unflatten
from dynlora_fn.bases._base import StoredBase, as_base


def stack_members(base: StoredBase) -> Iterator[StoredBase]:
    """Yield the bases of a stack in row-major order, as views."""
    stack = as_base(base).shape[:-2]
    leaves, structure = tree_flatten(base)
    rows = [leaf.reshape(stack.numel(), *leaf.shape[len(stack) :]) for leaf in leaves]
    for index in range(stack.numel()):
        yield tree_unflatten([row[index] for row in rows], structure)


def stack_bases(members: Iterable[StoredBase], stack: Sequence[int]) -> StoredBase:
    """Copy the members into one base with the leading axes `stack`.

    If `members` is an iterator, only one member is in memory beside the result. Members of different dtypes are
    converted to their promoted dtype.
    """
    members = iter(members)
    first = next(members)
    leaves, structure = tree_flatten(first)
    if not are_immediate(leaves):
        return _stack_at_once([first, *members], stack)
    stacks = [leaf.new_empty((prod(stack), *leaf.shape)) for leaf in leaves]
    for index, member in enumerate(chain([first], members)):
        for at, leaf in enumerate(tree_leaves(member)):
            if leaf.dtype != stacks[at].dtype:
                stacks[at] = stacks[at].to(torch.promote_types(leaf.dtype, stacks[at].dtype))
            stacks[at][index] = leaf
    return tree_unflatten([leaf.reshape((*stack, *leaf.shape[1:])) for leaf in stacks], structure)


def _stack_at_once(members: Sequence[StoredBase], stack: Sequence[int]) -> StoredBase:
    return tree_map(lambda *leaves: torch.stack(leaves).reshape((*stack, *leaves[0].shape)), *members)
