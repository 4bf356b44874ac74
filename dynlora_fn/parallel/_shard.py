"""Frozen bases that lie on several processes, each with some of their rows."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dynlora_fn._core._torch import MappingKey, resolve_process_group, tree_flatten_with_path, tree_map_with_path
from dynlora_fn._core._tree import map_low_rank
from dynlora_fn._core._types import Factors, LowRank, Param, Params, Sharding
from dynlora_fn.bases._float4 import NVFP4Codes, with_factors_by_row, with_one_factor
from dynlora_fn.bases._nf4 import NF4Codes
from dynlora_fn.bases._quantized import base_shape
from dynlora_fn.bases._sharded import gather_base, map_rows
from dynlora_fn.bases._sharded_factors import gather_factors
from dynlora_fn.bases._types import Deferred, FoldedBase, LocalBase, Quantized, Sharded

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
    if sharding := param.factor_sharding:
        assert isinstance(param.base, Sharded)
        held = param.base._replace(sharding=replace(sharding, columns=None))
        param = param._replace(base=held, factors=gather_factors(param.factors, sharding))
    base = param.base
    if isinstance(base, Deferred):
        return param._replace(base=base._replace(base=_unsharded(base.base)))
    return param._replace(base=_unsharded(base))


def _unsharded(base: FoldedBase) -> LocalBase:
    held = gather_base(base)
    if isinstance(held, Quantized) and isinstance(held.codes, NVFP4Codes):
        return held._replace(codes=with_one_factor(held.codes))
    return held


@overload
def shard_factors(params: LowRank, *, weight: float | None = ...) -> LowRank: ...
@overload
def shard_factors(params: Params, *, weight: float | None = ...) -> dict[str, Param]: ...
def shard_factors(params: LowRank | Params, *, weight: float | None = None) -> LowRank | dict[str, Param]:
    """The same weights, of whose factors each process keeps a share as well: `b` by the rows that it has of the base,
    `a` by as many columns.

    What is trained, its gradients and the optimizer's state are then a share of themselves. The factors of a weight are
    gathered for each product and let go of, in the backward pass again, and its gradients are reduced there, each
    process being left with its own: `all_reduce_mean`, `clip_by_global_norm` and `muon` must be told by ``frozen=``.
    Any other optimizer must go number by number, as `adamw` does. A switch draws the incoming vectors without a
    message, but needs all of those rows of `a` that it folds into the base: ``vectors * in`` numbers are gathered for
    each weight.

    Args:
        params: one weight, or weights by name, whose bases are sharded; full-rank tensors stay whole.
        weight: of this process in the mean of the gradients, as in `all_reduce_mean`; 1 / their number unless
            given.

    Raises:
        ValueError: if a base is not sharded, folds wait in it or its factors are sharded already; it names the weight.

    Numerics: those of whole factors but for the order in which gradients are summed up.
    """
    if isinstance(params, LowRank):
        return _shard_factors("param", params, weight)
    return {
        name: _shard_factors(name, param, weight) if isinstance(param, LowRank) else param
        for name, param in params.items()
    }


def _shard_factors(name: str, param: LowRank, weight: float | None) -> LowRank:
    base, (b, a) = param.base, param.factors
    if not isinstance(base, Sharded) or base.sharding.columns is not None:
        raise ValueError(f"`params` must have sharded bases and whole factors, none of them deferred, got {name!r}")
    weight = 1 / base.sharding.world_size if weight is None else weight
    sharding = replace(base.sharding, columns=a.shape[-1], weight=weight)
    own = Factors(b[..., sharding.local_rows, :].clone(), a[..., sharding.as_columns.local_rows].clone())
    return param._replace(base=base._replace(sharding=sharding), factors=own)


def _shard(name: str, param: LowRank, group: Group) -> LowRank:
    base = param.base
    if isinstance(base, Deferred):
        return param._replace(base=base._replace(base=_shard_base(name, base.base, group)))
    return param._replace(base=_shard_base(name, base, group))


def _shard_base(name: str, base: FoldedBase, group: Group) -> Sharded:
    if isinstance(base, Sharded):
        raise ValueError(f"`params` must not be sharded already, got {name!r}, which is")
    *_, rows, columns = base_shape(base)
    sharding = sharding_of(group, rows)
    if isinstance(base, Quantized) and isinstance(base.codes, NVFP4Codes):
        base = base._replace(codes=with_factors_by_row(base.codes))
    if isinstance(base, Quantized) and isinstance(base.codes, NF4Codes):
        shared = rows * columns // base.codes.factor.shape[-1]
        if rows % sharding.world_size or sharding.rows_per_process * columns % shared:
            rule = (
                f"have rows for {sharding.world_size} processes in whole runs of {shared} numbers, which share a factor"
            )
            raise ValueError(f"`params` in nf4 must {rule}, got {name!r} of shape {(rows, columns)}")

    def own(leaf: Tensor, sharding: Sharding) -> Tensor:
        return leaf[..., sharding.local_rows, :].clone()  # so that the rest can be freed

    return Sharded(map_rows(own, base, sharding), sharding)


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

    Raises:
        ValueError: if moments of sharded factors are in 8 bit and their shares differ in size; it names the weight. A
            process whose own share is held in float32, since the blocks do not divide it, cannot tell.

    Numerics: moments in 8 bit are blocks of this process's own numbers, whose scales lie row after row by processes. As
        many processes can go on from them; for others their shape is another, which is refused on loading.
    """
    shardings = shardings_in(tree)

    def place(path: Any, node: Any) -> Any:
        if isinstance(node, Sharded):
            return node._replace(base=map_rows(partial(_placed, axis=-2), node.base, node.sharding))
        if (name := is_under(path, shardings)) is None or not isinstance(node, Tensor) or not _has_numbers(node):
            return node
        *_, above, last = ("", *(getattr(key, "name", "") for key in path))
        side = above if last in ("codes", "scale") else last
        sharding = shardings[name] if side == "b" else shardings[name].as_columns
        if side != last and sharding.rows % sharding.world_size:
            rule = "hold shares of one size where moments are in 8 bit"
            raise ValueError(f"`tree` must {rule}, got {sharding.rows} for {sharding.world_size} processes of {name!r}")
        if last == "scale":
            return _placed(node[None], replace(sharding, rows=sharding.world_size), -2)
        return _placed(node, sharding, -2 if side == "b" else -1)

    return tree_map_with_path(place, tree, is_leaf=lambda node: isinstance(node, Sharded))


def _has_numbers(leaf: Tensor) -> bool:
    """Unlike seeds, and counts of vectors, which are the same everywhere."""
    return leaf.dtype not in (torch.int32, torch.int64)


def _placed(leaf: Tensor, sharding: Sharding, axis: int) -> Tensor:
    from torch.distributed.tensor import DTensor, Shard  # noqa: PLC0415 (takes a second to import)

    group = resolve_process_group(sharding.group)
    shape = list(leaf.shape)
    shape[axis] = sharding.rows
    mesh = DeviceMesh.from_group(group, leaf.device.type)
    stride = torch.empty(shape, device="meta").stride()
    place, whole = [Shard(leaf.ndim + axis)], torch.Size(shape)
    made: Tensor = DTensor.from_local(leaf, mesh, place, run_check=False, shape=whole, stride=stride)
    return made


def shardings_in(tree: Any) -> dict[str, Sharding]:
    """Of all sharded factors by name, wherever their bases are in a state."""
    found, _ = tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, Sharded))
    named = {_names(path)[-1]: leaf.sharding for path, leaf in found if isinstance(leaf, Sharded) and _names(path)}
    return {name: sharding for name, sharding in named.items() if sharding.columns is not None}


def is_under(path: Any, names: Mapping[str, Any]) -> str | None:
    """Which of the names, if any, a leaf of a tree is under."""
    return next((name for name in _names(path) if name in names), None)


def _names(path: Any) -> list[str]:
    return [key.key for key in path if isinstance(key, MappingKey)]
