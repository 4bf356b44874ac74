"""Average gradients over processes."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from dynlora_fn._core._attached import is_attached
from dynlora_fn._core._check import check_rate
from dynlora_fn._core._collectives import weighted
from dynlora_fn._core._func_scope import is_in_func
from dynlora_fn._core._torch import (
    forward_levels,
    functional_collectives,
    tree_flatten_with_path,
    tree_unflatten,
)
from dynlora_fn._core._types import ShardedFactors, Sharding
from dynlora_fn.parallel._group import Group, check_weight, has_processes_of, process_group
from dynlora_fn.parallel._shards import name_of


def all_reduce_mean(tree: Any, group: Group, *, weight: float | Tensor | None = None) -> Any:
    """Average every tensor over the processes.

    The result has the same bits on all processes. It is the sum over processes of ``weight * tensor``.

    Tensors of one dtype are concatenated, so there is one all-reduce for each dtype, however many weights there are. A
    float32 loss beside float32 gradients costs four bytes and no additional all-reduce. The function works in eager
    mode and inside `compile_step`. Collective: call it on every process.

    Gradients of sharded factors are returned unchanged, because the backward pass has averaged them already.

    Args:
        tree: A tree of tensors, such as ``(loss, grads)``, with equal structure, shapes and dtypes on every process.
        group: The process group, or a mesh of one dimension.
        weight: The weight of this process in the mean, for batches of unequal sizes: a number in [0, 1] or a 0-d
            tensor. The weights of all processes must sum to 1. With weight 0 the tensors of this process count as zero.
            They may be NaN then, as the mean over an empty batch is. Default None means 1 / the number of processes.

    Returns:
        A tree with the structure, shapes and dtypes of `tree`.

    Raises:
        TypeError: If a leaf is not a tensor of a floating or complex dtype.
        NotImplementedError: If a transform of `torch.func` differentiates by a leaf, or in forward mode.
        ValueError: If the weight is a number outside [0, 1] or a tensor with axes. Also if gradients of sharded factors
            have been averaged with another weight or over another group.

    Numerics: Each term is scaled first, and terms are summed in the dtype of the tensor. The order of the sum depends
        on the number of processes.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> import dynlora_fn as dl
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> dl.parallel.all_reduce_mean({"w": torch.ones(2)}, dist.group.WORLD)
        {'w': tensor([1., 1.])}
        >>> dist.destroy_process_group()
    """
    processes = process_group(group)
    weight = 1 / processes.size() if weight is None else _checked(weight)
    paths, structure = tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, ShardedFactors))
    leaves = [leaf for _, leaf in paths]
    buckets: dict[torch.dtype, list[int]] = defaultdict(list)
    for at, (path, leaf) in enumerate(paths):
        if isinstance(leaf, ShardedFactors):
            _check_is_averaged(path, leaf.sharding, processes, weight)
        else:
            _check_can_be_averaged(path, leaf)
            buckets[leaf.dtype].append(at)
    for members in buckets.values():
        bucket = weighted(torch.cat([leaves[at].flatten() for at in members]), weight)
        reduced: Tensor = functional_collectives.wait_tensor(functional_collectives.all_reduce(bucket, "sum", group))  # type: ignore[no-untyped-call]
        parts = torch.split(reduced, [leaves[at].numel() for at in members])
        for at, part in zip(members, parts, strict=True):
            leaves[at] = part.reshape(leaves[at].shape)
    return tree_unflatten(leaves, structure)


def _checked(weight: float | Tensor) -> float | Tensor:
    if not isinstance(weight, Tensor):
        return check_weight(weight)
    check_rate("weight", weight)
    return weight


def _check_can_be_averaged(path: Any, leaf: Any) -> None:
    if not isinstance(leaf, Tensor):
        raise TypeError(
            f"`tree` has {leaf!r} at {name_of(path)}, which is not a tensor; pass a 0-d tensor or remove it"
        )
    if leaf.layout != torch.strided:
        raise TypeError(f"`tree` has a tensor of layout {leaf.layout} at {name_of(path)}; pass a dense one")
    if not (leaf.is_floating_point() or leaf.is_complex()) or leaf.dtype.itemsize < 2:
        raise TypeError(
            f"`tree` has a tensor of dtype {leaf.dtype} at {name_of(path)}, in which a mean is rounded; convert it to a"
            " floating dtype of at least 16 bits"
        )
    if forward_levels() or (is_in_func() and is_attached(leaf)):
        raise NotImplementedError(
            f"`tree` has a tensor at {name_of(path)} inside of a transform that differentiates by it, and an all-reduce"
            " has no derivative there; differentiate first, and average the result"
        )


def _check_is_averaged(
    path: Any, sharding: Sharding, group: torch.distributed.ProcessGroup, weight: float | Tensor
) -> None:
    """Raise if the backward pass averaged sharded factors differently than this call.

    Raises:
        ValueError: If the weight or the group differs.
    """
    if isinstance(weight, Tensor) or weight != sharding.weight:
        raise ValueError(
            f"`weight` {weight} does not apply to the sharded factors at {name_of(path)}, whose gradients the backward"
            f" pass has averaged with the weight {sharding.weight}; pass the same number to `shard_factors(weight=)`"
        )
    if not has_processes_of(group, sharding.group):
        raise ValueError(
            f"`group` {group.group_name!r} has other processes than {sharding.group!r}, over which the sharded factors"
            f" at {name_of(path)} are sharded and averaged; pass the group that was passed to `shard`"
        )
