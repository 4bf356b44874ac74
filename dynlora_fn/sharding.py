"""Frozen bases that lie on several processes, each with some of their rows."""

from typing import Any, TypeAlias, overload

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_map

from dynlora_fn.bases import base_shape, on_rows, whole
from dynlora_fn.float4 import with_factors_by_row, with_one_factor
from dynlora_fn.tree import map_low_rank
from dynlora_fn.types import (
    Deferred,
    Held,
    LowRank,
    NF4Codes,
    NVFP4Codes,
    Param,
    Params,
    Quantized,
    Sharded,
    Sharding,
    Standing,
)

Group: TypeAlias = "torch.distributed.ProcessGroup | DeviceMesh"


@overload
def shard(params: LowRank, group: Group) -> LowRank: ...
@overload
def shard(params: Params, group: Group) -> dict[str, Param]: ...
def shard(params: LowRank | Params, group: Group) -> LowRank | dict[str, Param]:
    """The same weights, of whose bases each process keeps as many rows as every other, and no more.

    A base is gathered for each product that reads it, in the forward and again in the backward pass, as it is stored:
    int8 travels as int8. `switch` and `merge` fold into the rows of this process and send nothing, and since nothing
    frozen has a gradient there is no reduce-scatter. Rows of `out` rather than layers of a stack, since any number of
    layers is then in balance, a gather is one contiguous all-gather, and a scale for each row stays with its row.

    Args:
        params: one weight, or weights by name, the same on every process; factors and full-rank tensors stay whole.
        group: the processes, a group or a mesh of one dimension.

    Raises:
        ValueError: if a base is sharded already or in nf4 where the rows of a process share a factor with those of
            another (they are whole runs of 16,384 numbers in most weights), or the mesh has more than one dimension; it
            names the weight.

    Numerics: products see the bits that they see of the whole base. A fold into codes multiplies matrices of fewer
        rows, whose last bit may be rounded in another way. A whole base in nf4 is encoded anew wherever it is folded
        into; sharded, by those processes on whose rows anything changes. nvfp4 has one factor for the weight, by which
        no rows can be encoded apart from others: once a sharded one is folded into, each row has its own, and stays
        so when it is unsharded.
    """
    if isinstance(params, LowRank):
        return _shard("param", params, group)
    return {name: _shard(name, param, group) if isinstance(param, LowRank) else param for name, param in params.items()}


@overload
def unshard(params: LowRank) -> LowRank: ...
@overload
def unshard(params: Params) -> dict[str, Param]: ...
def unshard(params: LowRank | Params) -> LowRank | dict[str, Param]:
    """The same weights, of whose bases this process holds all rows; every process of the group must ask for it."""
    return map_low_rank(_unshard, params)  # type: ignore[return-value]


def _unshard(param: LowRank) -> LowRank:
    base = param.base
    if isinstance(base, Deferred):
        return param._replace(base=base._replace(base=_unsharded(base.base)))
    return param._replace(base=_unsharded(base))


def _unsharded(base: Standing) -> Held:
    held = whole(base)
    if isinstance(held, Quantized) and isinstance(held.codes, NVFP4Codes):
        return held._replace(codes=with_one_factor(held.codes))
    return held


def _shard(name: str, param: LowRank, group: Group) -> LowRank:
    base = param.base
    if isinstance(base, Deferred):
        return param._replace(base=base._replace(base=_shard_base(name, base.base, group)))
    return param._replace(base=_shard_base(name, base, group))


def _shard_base(name: str, base: Standing, group: Group) -> Sharded:
    if isinstance(base, Sharded):
        raise ValueError(f"`params` must not be sharded already, got {name!r}, which is")
    *_, rows, columns = base_shape(base)
    sharding = sharding_of(group, rows)
    if isinstance(base, Quantized) and isinstance(base.codes, NVFP4Codes):
        base = base._replace(codes=with_factors_by_row(base.codes))
    if isinstance(base, Quantized) and isinstance(base.codes, NF4Codes):
        shared = rows * columns // base.codes.factor.shape[-1]
        if rows % sharding.size or sharding.share * columns % shared:
            rule = f"have rows for {sharding.size} processes in whole runs of {shared} numbers, which share a factor"
            raise ValueError(f"`params` in nf4 must {rule}, got {name!r} of shape {(rows, columns)}")

    def own(leaf: Tensor, sharding: Sharding) -> Tensor:
        return leaf[..., sharding.own, :].clone()  # so that the rest can be freed

    return Sharded(on_rows(own, base, sharding), sharding)


def sharding_of(group: Group, rows: int) -> Sharding:
    """Of so many rows over the processes of a group."""
    group = process_group(group)
    return Sharding(group.group_name, group.size(), group.rank(), rows)


def process_group(group: Group) -> torch.distributed.ProcessGroup:
    """The processes of a mesh of one dimension."""
    if not isinstance(group, DeviceMesh):
        return group
    if group.ndim != 1:
        raise ValueError(f"`group` must be a mesh of one dimension, such as mesh['data'], got one of {group.ndim}")
    return group.get_group()


def as_dtensors(tree: Any) -> Any:
    """The same tree with a `DTensor` for every tensor of a sharded base, in the same memory.

    For `torch.distributed.checkpoint`, which writes and reads them by their place in the whole: what is saved by four
    processes can be loaded by three. What is read into the result is in `tree`.

    Args:
        tree: of tensors, with sharded bases in it: parameters, or all of a state.
    """
    return tree_map(_as_dtensors, tree, is_leaf=lambda node: isinstance(node, Sharded))


def _as_dtensors(node: Any) -> Any:
    if not isinstance(node, Sharded):
        return node
    from torch.distributed.tensor import DTensor, Shard  # noqa: PLC0415 (takes a second to import)

    group = torch._C._distributed_c10d._resolve_process_group(node.sharding.group)  # type: ignore[arg-type]

    def placed(leaf: Tensor, sharding: Sharding) -> Tensor:
        shape = torch.Size((*leaf.shape[:-2], sharding.rows, leaf.shape[-1]))
        stride = torch.empty(shape, device="meta").stride()
        mesh = DeviceMesh.from_group(group, leaf.device.type)
        made: Tensor = DTensor.from_local(
            leaf, mesh, [Shard(leaf.ndim - 2)], run_check=False, shape=shape, stride=stride
        )
        return made

    held: Held = on_rows(placed, node.base, node.sharding)
    return node._replace(base=held)
