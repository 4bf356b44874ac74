"""Shard bases and factors over processes, gather them, and place them in `DTensor`s for checkpoints."""

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
    """Shard each base by rows over `group`.

    The weights do not change. Each process stores equally many rows of every base, and fewer on the last processes if
    the number of rows does not divide. A base is all-gathered in its storage format for each product, in the forward
    pass and again in the backward pass. `switch` and `merge` fold into the rows of this process and send nothing.
    Frozen tensors have no gradient, so there is no reduce-scatter.

    Bases are sharded by rows, and not by the layers of a stack, for three reasons. Any number of layers is balanced, a
    gather is one contiguous all-gather, and a scale for each row stays with its row.

    Args:
        params: One weight, or weights by name, equal on every process. Factors and full-rank tensors are not sharded.
        group: The process group, or a mesh of one dimension.

    Returns:
        The same weights with `Sharded` bases.

    Raises:
        ValueError: If a base is sharded already, the mesh has more than one dimension, or the rows of two processes
            would share a factor of nf4. In most weights 16,384 consecutive entries share one.

    Numerics: Products read the same bits as those of the unsharded base. A fold into codes multiplies matrices with
        fewer rows, so the last bit may be rounded differently. A fold encodes all of an unsharded nf4 base again, but
        only the shards of a sharded one whose rows change. nvfp4 has one factor for the weight, so its rows cannot be
        encoded independently. After a fold into a sharded nvfp4 base, each row has a factor, also after `unshard`.

    Example:
        >>> import torch.distributed as dist
        >>> import dynlora_fn as dl
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> params = dl.init({"w": torch.ones(6, 4)}, rank=2, seed=0, targets=["w"])
        >>> dl.parallel.shard(params, dist.group.WORLD)["w"].base.base.shape
        torch.Size([6, 4])
        >>> dist.destroy_process_group()
    """
    if isinstance(params, LowRank):
        return _shard("param", params, group)
    return {name: _shard(name, param, group) if isinstance(param, LowRank) else param for name, param in params.items()}


@overload
def unshard(params: LowRank) -> LowRank: ...
@overload
def unshard(params: Params) -> dict[str, Param]: ...
def unshard(params: LowRank | Params) -> LowRank | dict[str, Param]:
    """Gather sharded bases and factors, so that every process stores all rows.

    The weights do not change, and the gathered bits are those of the shards. Collective: call it on every process.

    Args:
        params: One weight, or weights by name. Weights that are not sharded, and tensors, are returned unchanged.

    Returns:
        The same weights with bases and factors that are not sharded.

    Example:
        >>> import torch.distributed as dist
        >>> import dynlora_fn as dl
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> params = dl.init({"w": torch.ones(6, 4)}, rank=2, seed=0, targets=["w"])
        >>> dl.parallel.unshard(dl.parallel.shard(params, dist.group.WORLD))["w"].base.shape
        torch.Size([6, 4])
        >>> dist.destroy_process_group()
    """
    return map_low_rank(_unshard, params)  # type: ignore[return-value]


def _unshard(param: LowRank) -> LowRank:
    if sharding := param.factor_sharding:
        assert isinstance(param.base, Sharded)
        rows_only = param.base._replace(sharding=replace(sharding, columns=None))
        param = param._replace(base=rows_only, factors=gather_factors(param.factors, sharding))
    base = param.base
    if isinstance(base, Deferred):
        return param._replace(base=base._replace(base=_unsharded(base.base)))
    return param._replace(base=_unsharded(base))


def _unsharded(base: FoldedBase) -> LocalBase:
    gathered = gather_base(base)
    if isinstance(gathered, Quantized) and isinstance(gathered.codes, NVFP4Codes):
        return gathered._replace(codes=with_one_factor(gathered.codes))
    return gathered


@overload
def shard_factors(params: LowRank, *, weight: float | None = ...) -> LowRank: ...
@overload
def shard_factors(params: Params, *, weight: float | None = ...) -> dict[str, Param]: ...
def shard_factors(params: LowRank | Params, *, weight: float | None = None) -> LowRank | dict[str, Param]:
    """Shard the factors of weights whose bases are sharded.

    The weights do not change. `b` is sharded by rows, as the base is, and `a` by columns. Gradients and optimizer state
    are sharded in the same way. The factors of a weight are all-gathered for each product, in the forward pass and
    again in the backward pass, and then freed. The backward pass also reduce-scatters their gradients.

    Pass ``frozen=`` to `all_reduce_mean`, `clip_by_global_norm` and `muon`, so that they treat shards as shards. Any
    other optimizer must be elementwise, as `adamw` is. A switch generates the incoming vectors without communication.
    It all-gathers the rows of `a` that it folds into the base: ``vectors * in`` entries for each weight.

    Args:
        params: One weight, or weights by name. Full-rank tensors are not sharded.
        weight: The weight of this process in the mean of the gradients, as in `all_reduce_mean`. Default None means
            1 / the number of processes.

    Returns:
        The same weights with sharded factors.

    Raises:
        ValueError: If a base is not sharded, is deferred, or its factors are sharded already.

    Numerics: Those of factors that are not sharded, except for the order in which gradients are summed.

    Example:
        >>> import torch.distributed as dist
        >>> import dynlora_fn as dl
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> params = dl.init({"w": torch.ones(6, 4)}, rank=2, seed=0, targets=["w"])
        >>> sharded = dl.parallel.shard_factors(dl.parallel.shard(params, dist.group.WORLD))
        >>> sharded["w"].factor_sharding.columns
        4
        >>> dist.destroy_process_group()
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
        raise ValueError(
            f"the factors of {name!r} in `params` cannot be sharded: its base must be sharded and not deferred, and its"
            " factors must not be sharded already; call `shard` first, and `shard_factors` once"
        )
    weight = 1 / base.sharding.world_size if weight is None else weight
    sharding = replace(base.sharding, columns=a.shape[-1], weight=weight)
    shards = Factors(b[..., sharding.local_rows, :].clone(), a[..., sharding.as_columns.local_rows].clone())
    return param._replace(base=base._replace(sharding=sharding), factors=shards)


def _shard(name: str, param: LowRank, group: Group) -> LowRank:
    base = param.base
    if isinstance(base, Deferred):
        return param._replace(base=base._replace(base=_shard_base(name, base.base, group)))
    return param._replace(base=_shard_base(name, base, group))


def _shard_base(name: str, base: FoldedBase, group: Group) -> Sharded:
    if isinstance(base, Sharded):
        raise ValueError(f"the base of {name!r} in `params` is sharded already; call `unshard` first")
    *_, rows, columns = base_shape(base)
    sharding = sharding_of(group, rows)
    if isinstance(base, Quantized) and isinstance(base.codes, NVFP4Codes):
        base = base._replace(codes=with_factors_by_row(base.codes))
    if isinstance(base, Quantized) and isinstance(base.codes, NF4Codes):
        entries = rows * columns // base.codes.factor.shape[-1]
        if rows % sharding.world_size or sharding.rows_per_process * columns % entries:
            raise ValueError(
                f"the base of {name!r} in `params`, in nf4 and of shape {(rows, columns)}, cannot be sharded over"
                f" {sharding.world_size} processes: each must store a multiple of the {entries} entries that share a"
                " factor; use another format or another number of processes"
            )

    def local(leaf: Tensor, sharding: Sharding) -> Tensor:
        return leaf[..., sharding.local_rows, :].clone()  # a copy, so that the other rows can be freed

    return Sharded(map_rows(local, base, sharding), sharding)


def sharding_of(group: Group, rows: int) -> Sharding:
    """Return how `rows` rows are sharded over the processes of a group."""
    group = process_group(group)
    return Sharding(group.group_name, group.size(), group.rank(), rows)


def process_group(group: Group) -> torch.distributed.ProcessGroup:
    """Return the process group of a mesh of one dimension, or the group itself.

    Raises:
        ValueError: If the mesh has more than one dimension.
    """
    if not isinstance(group, DeviceMesh):
        return group
    if group.ndim != 1:
        raise ValueError(
            f"`group` is a mesh of {group.ndim} dimensions; pass a mesh of one dimension, such as mesh['data']"
        )
    return group.get_group()


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
