"""Sharded tensors as `DTensor`, for checkpoints, and the shardings in a state."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dynlora_fn._core._torch import MappingKey, resolve_process_group, tree_flatten_with_path, tree_map_with_path
from dynlora_fn._core._types import Sharding
from dynlora_fn.bases._sharded import map_rows
from dynlora_fn.bases._types import Sharded


def as_dtensors(tree: Any) -> Any:
    """Replace every sharded tensor by a `DTensor` in the same memory.

    `torch.distributed.checkpoint` saves and loads a `DTensor` by its place in the unsharded tensor. So a checkpoint of
    four processes can be loaded by three. Loading into the result changes the tensors of `tree`.

    Args:
        tree: A tree of tensors with sharded bases, such as parameters or a complete training state.

    Returns:
        A tree of the same structure.

    Raises:
        ValueError: If the moments of sharded factors are in 8 bit and the shards differ in size. A process does not
            notice it if its shard is in float32 because blocks do not divide it.

    Numerics: Blocks of 8-bit moments are blocks of a shard, and their scales are stored as one row for each process. So
        only as many processes can resume from them. For another number the shapes differ, and loading fails.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> import dynlora_fn as dl
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> params = dl.init({"w": torch.ones(6, 4)}, rank=2, seed=0, targets=["w"])
        >>> placed = dl.parallel.as_dtensors(dl.parallel.shard(params, dist.group.WORLD))
        >>> type(placed["w"].base.base).__name__
        'DTensor'
        >>> dist.destroy_process_group()
    """
    shardings = shardings_in(tree)

    def place(path: Any, node: Any) -> Any:
        if isinstance(node, Sharded):
            return node._replace(base=map_rows(partial(_placed, axis=-2), node.base, node.sharding))
        if (name := is_under(path, shardings)) is None or not isinstance(node, Tensor) or not _is_sharded(node):
            return node
        *_, parent, last = ("", *(getattr(key, "name", "") for key in path))
        side = parent if last in ("codes", "scale") else last
        sharding = shardings[name] if side == "b" else shardings[name].as_columns
        if side != last and sharding.rows % sharding.world_size:
            raise ValueError(
                f"`tree` has 8-bit moments of {name!r} whose shards differ in size: {sharding.rows} rows or columns"
                f" over {sharding.world_size} processes; use float32 moments, or processes that divide them evenly"
            )
        if last == "scale":
            return _placed(node[None], replace(sharding, rows=sharding.world_size), -2)
        return _placed(node, sharding, -2 if side == "b" else -1)

    return tree_map_with_path(place, tree, is_leaf=lambda node: isinstance(node, Sharded))


def _is_sharded(leaf: Tensor) -> bool:
    """Return whether a leaf under the name of sharded factors is sharded.

    Seeds and counts are not: they are equal on all processes.
    """
    return leaf.dtype not in (torch.int32, torch.int64)


def _placed(leaf: Tensor, sharding: Sharding, axis: int) -> Tensor:
    from torch.distributed.tensor import DTensor, Shard  # noqa: PLC0415 (takes a second to import)

    group = resolve_process_group(sharding.group)
    shape = list(leaf.shape)
    shape[axis] = sharding.rows
    mesh = DeviceMesh.from_group(group, leaf.device.type)
    stride = torch.empty(shape, device="meta").stride()
    placements, full_shape = [Shard(leaf.ndim + axis)], torch.Size(shape)
    placed: Tensor = DTensor.from_local(leaf, mesh, placements, run_check=False, shape=full_shape, stride=stride)
    return placed


def shardings_in(tree: Any) -> dict[str, Sharding]:
    """Return the shardings of all sharded factors in a state, by name."""
    found, _ = tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, Sharded))
    named = {_names(path)[-1]: leaf.sharding for path, leaf in found if isinstance(leaf, Sharded) and _names(path)}
    return {name: sharding for name, sharding in named.items() if sharding.columns is not None}


def is_under(path: Any, names: Mapping[str, Any]) -> str | None:
    """Return the first of the names that is a key on the path of a leaf, or None."""
    return next((name for name in _names(path) if name in names), None)


def _names(path: Any) -> list[str]:
    return [key.key for key in path if isinstance(key, MappingKey)]
