"""Sharded tensors as `DTensor`, for checkpoints."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dynlora_fn._core._torch import keystr, resolve_process_group, tree_map_with_path
from dynlora_fn._core._types import ShardedFactors, Sharding
from dynlora_fn.bases._sharded import Sharded


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
    return tree_map_with_path(_place, tree, is_leaf=lambda node: isinstance(node, Sharded | ShardedFactors))


def _place(path: Any, node: Any) -> Any:
    if isinstance(node, Sharded):
        return node.map_rows(partial(_placed, axis=-2), node.sharding)
    if isinstance(node, ShardedFactors):
        b = _place_side(path, node.b, node.sharding, -2)
        return node._replace(b=b, a=_place_side(path, node.a, node.sharding.as_columns, -1))
    return node


def _place_side(path: Any, side: Any, sharding: Sharding, axis: int) -> Any:
    """Place a tensor, or a moment in 8 bit."""
    if isinstance(side, Tensor):
        return _placed(side, sharding, axis)
    if sharding.rows % sharding.world_size:
        raise ValueError(
            f"`tree` has 8-bit moments at {keystr(path)} whose shards differ in size: {sharding.rows} rows or columns"
            f" over {sharding.world_size} processes; use float32 moments, or processes that divide them evenly"
        )
    scale = _placed(side.scale[None], replace(sharding, rows=sharding.world_size), -2)
    return side._replace(codes=_placed(side.codes, sharding, axis), scale=scale)


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
