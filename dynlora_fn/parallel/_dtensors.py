"""Convert shards to `DTensor`, for checkpoints."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dynlora_fn._core._torch import keystr, resolve_process_group, tree_flatten_with_path, tree_map_with_path
from dynlora_fn._core._types import Sharding
from dynlora_fn.parallel._shards import full_shape, is_sharded, map_shards, name_of


def as_dtensors(tree: Any) -> dict[str, Tensor]:
    """Return the tensors of a tree by path, with shards as `DTensor`.

    The result shares the memory of `tree`, so loading into it changes the tensors of `tree`. Pass it to
    `torch.distributed.checkpoint`, which saves and loads a `DTensor` by its place in the unsharded tensor. So three
    processes can load a checkpoint of four. The result is flat, because `torch.distributed.checkpoint` looks into dicts
    and lists but pickles tuples.

    Args:
        tree: A tree of tensors, such as parameters or a complete training state. None is left out.

    Returns:
        The tensors by path, such as ``"['w'].base"``. Shards of bases, factors and moments are `DTensor`.

    Raises:
        TypeError: If a leaf is not a tensor. Loading could not change it.
        ValueError: If a tensor in sharded factors does not have the shape of a shard.

    Numerics: Blocks of 8-bit moments are blocks of a shard, and their scales are stored as one row for each process. So
        only the same number of processes can resume from them. For another number the shapes differ, and loading fails.

    Example:
        >>> import tempfile
        >>> import torch
        >>> import torch.distributed as dist
        >>> from torch.distributed import checkpoint
        >>> import dynlora_fn as dl
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> saved, loaded = (
        ...     dl.parallel.shard(dl.init({"w": weight}, rank=2, seed=0, targets=["w"]), dist.group.WORLD)
        ...     for weight in (torch.ones(6, 4), torch.zeros(6, 4))
        ... )
        >>> {path: type(leaf).__name__ for path, leaf in dl.parallel.as_dtensors(saved).items()}
        {"['w'].base.base": 'DTensor', "['w'].factors.b": 'Tensor', "['w'].factors.a": 'Tensor', "['w'].seed": 'Tensor'}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = checkpoint.save(dl.parallel.as_dtensors(saved), checkpoint_id=folder)
        ...     checkpoint.load(dl.parallel.as_dtensors(loaded), checkpoint_id=folder)
        >>> torch.equal(*(dl.materialize(dl.parallel.unshard(params))["w"] for params in (saved, loaded)))
        True
        >>> dist.destroy_process_group()
    """
    placed = tree_map_with_path(_place, tree, is_leaf=is_sharded)
    leaves = [(path, leaf) for path, leaf in tree_flatten_with_path(placed)[0] if leaf is not None]
    for path, leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"`tree` has {leaf!r} at {name_of(path)}, which is not a tensor, so a checkpoint could not restore it;"
                " pass a 0-d tensor or remove it"
            )
    return {keystr(path): leaf for path, leaf in leaves}


def _place(path: Any, node: Any) -> Any:
    if not is_sharded(node):
        return node
    if node.sharding.local_rows.step not in (None, 1):
        raise ValueError(
            f"the rows of this process at {name_of(path)} do not follow each other, which a `DTensor` cannot describe;"
            " pass the weight after `unshard`"
        )
    return map_shards(_placed, node, name_of(path))


def _placed(leaf: Tensor, sharding: Sharding, axis: int) -> Tensor:
    from torch.distributed.tensor import DTensor, Shard  # noqa: PLC0415 (takes a second to import)

    mesh = DeviceMesh.from_group(resolve_process_group(sharding.group), leaf.device.type)
    shape = full_shape(leaf, sharding, axis)
    stride, placements = torch.empty(shape, device="meta").stride(), [Shard(leaf.ndim + axis)]
    placed: Tensor = DTensor.from_local(leaf, mesh, placements, run_check=False, shape=shape, stride=stride)
    return placed
