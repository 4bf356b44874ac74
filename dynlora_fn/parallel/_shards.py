"""The sharded nodes of a tree, and the place of a shard in the unsharded tensor."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor

from dynlora_fn._core._torch import keystr
from dynlora_fn._core._types import ShardedFactors, Sharding
from dynlora_fn.bases._sharded import Sharded

ShardMap: TypeAlias = Callable[[Tensor, Sharding, int], Tensor]  # from a shard, its sharding and the sharded axis


def is_sharded(node: Any) -> TypeGuard[Sharded | ShardedFactors]:
    """Return whether a node of a tree is a sharded base or sharded factors.

    Gradients, moments and updates of sharded factors count as such.
    """
    return isinstance(node, Sharded | ShardedFactors)


def name_of(path: Any) -> str:
    """Return the path of a node as text, for error messages."""
    return keystr(path) or "its root"


def map_shards(change: ShardMap, node: Sharded | ShardedFactors, name: str) -> Any:
    """Apply `change` to every tensor of a node that is a shard.

    Args:
        change: A function of a shard, its sharding and the sharded axis, which is a negative number.
        node: A sharded base or sharded factors.
        name: The path of the node, for the error message.

    Raises:
        ValueError: If a tensor does not have the rows or columns that the sharding gives to this process.
    """

    def checked(leaf: Any, sharding: Sharding, axis: int) -> Tensor:
        count = len(range(sharding.rows)[sharding.local_rows])
        if not isinstance(leaf, Tensor) or leaf.ndim < 2 or leaf.shape[axis] != count:
            what = f"a tensor of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)
            raise ValueError(
                f"{what} in the {type(node).__name__} at {name} is not a shard:"
                f" this process has {count} entries along axis {axis}; pass it outside of the node"
            )
        return change(leaf, sharding, axis)

    if isinstance(node, Sharded):
        return node.map_rows(lambda leaf, rows: checked(leaf, rows, -2), node.sharding)
    b = _map_side(checked, node.b, node.sharding, -2)
    return node._replace(b=b, a=_map_side(checked, node.a, node.sharding.as_columns, -1))


def _map_side(change: ShardMap, side: Any, sharding: Sharding, axis: int) -> Any:
    """Map one side of factors: a tensor, None, or a moment in 8 bits.

    The scales of an 8-bit moment are mapped as one row for each process.
    """
    if side is None:
        return None
    if not hasattr(side, "codes"):
        return change(side, sharding, axis)
    scale = change(side.scale[None], replace(sharding, rows=sharding.world_size), -2)
    return side._replace(codes=change(side.codes, sharding, axis), scale=scale)


def full_shape(shard: Tensor, sharding: Sharding, axis: int) -> torch.Size:
    """Return the shape of the unsharded tensor."""
    shape = list(shard.shape)
    shape[axis] = sharding.rows
    return torch.Size(shape)
