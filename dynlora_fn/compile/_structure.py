"""Compare the state that a step returns with the state that was passed to it.

Dynamo traces this code for every tensor. Comparing two trees directly takes much less time to trace than the functions
of pytree.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import Tensor

from dynlora_fn._core._torch import keystr, tree_flatten, tree_flatten_with_path

Pair: TypeAlias = tuple[Any, Any]


def pair_leaves(old: Any, new: Any, pairs: list[Pair]) -> bool:
    """Append the pairs of leaves of two trees to `pairs`.

    Return whether the trees have the same structure: types, keys in the same order, and constants, as in pytree.
    """
    if isinstance(old, Tensor) or type(old) is not type(new):
        pairs.append((old, new))
        return isinstance(old, Tensor) and isinstance(new, Tensor)
    if isinstance(old, tuple | list):
        children, new_children = old, new
    elif type(old) is dict:
        if list(old) != list(new):
            return False
        children, new_children = list(old.values()), list(new.values())
    else:
        leaves, structure = tree_flatten(old)
        new_leaves, new_structure = tree_flatten(new)
        pairs.extend(zip(leaves, new_leaves, strict=False))
        return bool(structure == new_structure)
    if len(children) != len(new_children):
        return False
    for child, new_child in zip(children, new_children, strict=True):
        if type(child) is type(new_child) is Tensor:  # here, since a call takes longer to trace
            pairs.append((child, new_child))
        elif not pair_leaves(child, new_child, pairs):
            return False
    return True


def mismatch(state: Any, pairs: Sequence[Pair]) -> str | None:
    """Return the error message for a leaf that changes its shape or dtype, or None."""
    for index, (old, new) in enumerate(pairs):
        if old.shape != new.shape or old.dtype != new.dtype:
            name = keystr(tree_flatten_with_path(state)[0][index][0])
            change = f"from {tuple(old.shape)} {old.dtype} to {tuple(new.shape)} {new.dtype}, at {name}"
            return f"`step` changes a state tensor {change}; keep shapes and dtypes, or pass donate=False"
    return None
