"""Shard bases and factors over processes, and gather them."""

from dataclasses import replace
from typing import overload

from torch import Tensor

from dynlora_fn._core._check_trees import check_one_or_more
from dynlora_fn._core._tree import map_low_rank
from dynlora_fn._core._types import LowRank, OneSidedFactors, Param, Params, ShardedFactors, Sharding
from dynlora_fn.bases._base import StoredBase, as_base
from dynlora_fn.bases._refusals import refuse
from dynlora_fn.bases._sharded import Sharded
from dynlora_fn.bases._sharded_factors import gather_factors
from dynlora_fn.parallel._group import Group, check_weight, process_group, sharding_of


@overload
def shard(params: LowRank, group: Group) -> LowRank: ...
@overload
def shard(params: Params, group: Group) -> dict[str, Param]: ...
def shard(params: LowRank | Params, group: Group) -> LowRank | dict[str, Param]:
    """Shard each base by rows over `group`.

    The weights do not change. Each process stores the same number of rows of every base, and the last processes store
    fewer if the rows do not divide. A base is all-gathered in its storage format for each product, in the forward pass
    and again in the backward pass. `switch` and `merge` fold into the rows of this process and send nothing. Frozen
    tensors have no gradient, so there is no reduce-scatter.

    Bases are sharded by rows, and not by the layers of a stack, for three reasons. The load is balanced for any number
    of layers, a gather is one contiguous all-gather, and a scale for each row stays with its row.

    Args:
        params: One weight, or weights by name, equal on every process. Factors and full-rank tensors are not sharded.
        group: The process group, or a mesh of one dimension.

    Returns:
        The same weights with `Sharded` bases.

    Raises:
        TypeError: If `params` or `group` has a wrong type.
        ValueError: If a base is sharded already, the mesh has more than one dimension, or the rows of two processes
            would share a factor of nf4. In most weights 16,384 consecutive entries share one.

    Numerics: Products read the same bits as without sharding. A fold into codes multiplies matrices with fewer rows, so
        the last bit may be rounded differently. A fold encodes all of an unsharded nf4 base again, but of a sharded
        base only the shards whose rows change. nvfp4 has one factor for the weight, so its rows cannot be encoded
        independently. A fold into a sharded nvfp4 base gives each row a factor, which `unshard` keeps.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> import dynlora_fn as dl
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> params = dl.init({"w": torch.ones(6, 4)}, rank=2, seed=0, targets=["w"])
        >>> sharded = dl.parallel.shard(params, dist.group.WORLD)
        >>> sharded["w"].base.base.shape  # all rows, because this process is the only one
        torch.Size([6, 4])
        >>> torch.equal(dl.materialize(sharded["w"]), dl.materialize(params["w"]))
        True
        >>> dist.destroy_process_group()
    """
    check_one_or_more("params", params)
    process_group(group)
    if isinstance(params, LowRank):
        return _shard("param", params, group)
    return {name: _shard(name, param, group) if isinstance(param, LowRank) else param for name, param in params.items()}


@overload
def unshard(params: LowRank) -> LowRank: ...
@overload
def unshard(params: Params) -> dict[str, Param]: ...
def unshard(params: LowRank | Params) -> LowRank | dict[str, Param]:
    """Gather sharded bases and factors, so that every process stores all rows.

    The weights do not change, and every gathered row has the bits of its shard. Collective: call it on every process.

    Args:
        params: One weight, or weights by name. Weights that are not sharded, and tensors, are returned unchanged.

    Returns:
        The same weights with bases and factors that are not sharded.

    Raises:
        TypeError: If `params` has a value that is not a parameter.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> import dynlora_fn as dl
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> params = dl.init({"w": torch.ones(6, 4)}, rank=2, seed=0, targets=["w"])
        >>> gathered = dl.parallel.unshard(dl.parallel.shard(params, dist.group.WORLD))
        >>> torch.equal(gathered["w"].base, params["w"].base)
        True
        >>> dist.destroy_process_group()
    """
    return map_low_rank(_unshard, params)  # type: ignore[return-value]


def _unshard(param: LowRank) -> LowRank:
    if isinstance(param.factors, ShardedFactors):
        param = param._replace(factors=gather_factors(param.factors))
    return param._replace(base=as_base(param.base).gather())


@overload
def shard_factors(params: LowRank, *, weight: float | None = ...) -> LowRank: ...
@overload
def shard_factors(params: Params, *, weight: float | None = ...) -> dict[str, Param]: ...
def shard_factors(params: LowRank | Params, *, weight: float | None = None) -> LowRank | dict[str, Param]:
    """Shard the factors of weights whose bases are sharded.

    The weights do not change. `b` is sharded by rows, as the base is, and `a` by columns. Gradients and optimizer state
    are sharded in the same way. The factors of a weight are all-gathered for each product, in the forward pass and
    again in the backward pass, and then freed. The backward pass also reduce-scatters their gradients.

    Factors, gradients, moments and updates are `ShardedFactors`, so `all_reduce_mean`, `clip_by_global_norm` and `muon`
    treat shards as shards. Any other optimizer must be elementwise, as `adamw` is. A switch generates the incoming
    vectors without communication. It all-gathers the rows of `a` that it folds into the base: ``vectors * in`` entries
    for each weight.

    Args:
        params: One weight, or weights by name. Full-rank tensors are not sharded.
        weight: The weight of this process in the mean of the gradients. Pass the same number to `all_reduce_mean`.
            Default None means 1 / the number of processes.

    Returns:
        The same weights with sharded factors.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If a base is not sharded or is deferred, if its factors are sharded already, if only `b` is trained,
            or if `weight` is not in [0, 1].

    Numerics: The same as without sharded factors, except for the order in which gradients are summed.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> import dynlora_fn as dl
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> params = dl.init({"w": torch.ones(6, 4)}, rank=2, seed=0, targets=["w"])
        >>> sharded = dl.parallel.shard_factors(dl.parallel.shard(params, dist.group.WORLD))
        >>> sharded["w"].factor_sharding.columns
        4
        >>> dist.destroy_process_group()
    """
    check_one_or_more("params", params)
    if isinstance(params, LowRank):
        return _shard_factors("param", params, weight)
    return {
        name: _shard_factors(name, param, weight) if isinstance(param, LowRank) else param
        for name, param in params.items()
    }


def _shard_factors(name: str, param: LowRank, weight: float | None) -> LowRank:
    base, factors = as_base(param.base), param.factors
    if isinstance(factors, OneSidedFactors):
        refuse("shard_factors, one side", name=name)
    if not base.sharding or base.pending_folds or isinstance(factors, ShardedFactors):
        refuse("shard_factors, base", name=name)
    weight = 1 / base.sharding.world_size if weight is None else float(check_weight(weight))
    sharding = replace(base.sharding, columns=factors.a.shape[-1], weight=weight, alpha=param.alpha)
    b, a = factors.b[..., sharding.local_rows, :].clone(), factors.a[..., sharding.as_columns.local_rows].clone()
    return param._replace(factors=ShardedFactors(b, a, sharding))


def _shard(name: str, param: LowRank, group: Group) -> LowRank:
    return param._replace(base=as_base(param.base).map_folded(lambda base: _shard_base(name, base, group)))


def _shard_base(name: str, base: StoredBase, group: Group) -> Sharded:
    sharding = sharding_of(group, as_base(base).shape[-2])
    by_rows = as_base(base).by_rows(name, sharding)

    def local(leaf: Tensor, sharding: Sharding) -> Tensor:
        return leaf[..., sharding.local_rows, :].clone()  # a copy, so that the other rows can be freed

    return Sharded(as_base(by_rows).map_rows(local, sharding), sharding)
