"""The members of a stack of bases."""

from collections.abc import Iterator, Sequence

import torch

from dynlora_fn._core._torch import tree_flatten, tree_map, tree_unflatten
from dynlora_fn.bases._base import StoredBase, as_base


def stack_members(base: StoredBase) -> Iterator[StoredBase]:
    """Yield the bases of a stack in row-major order, as views."""
    stack = as_base(base).shape[:-2]
    leaves, structure = tree_flatten(base)
    rows = [leaf.reshape(stack.numel(), *leaf.shape[len(stack) :]) for leaf in leaves]
    for index in range(stack.numel()):
        yield tree_unflatten([row[index] for row in rows], structure)


def stack_bases(members: Sequence[StoredBase], stack: Sequence[int]) -> StoredBase:
    """Copy the members into one base with the leading axes `stack`."""
    return tree_map(lambda *leaves: torch.stack(leaves).reshape((*stack, *leaves[0].shape)), *members)
