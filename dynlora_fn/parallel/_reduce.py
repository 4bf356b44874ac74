"""Average gradients over processes."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from dynlora_fn._core._torch import functional_collectives, tree_flatten, tree_unflatten
from dynlora_fn._core._types import ShardedFactors
from dynlora_fn.parallel._group import Group, process_group


def all_reduce_mean(tree: Any, group: Group, *, weight: float | None = None) -> Any:
    """Average every tensor over the processes.

    The result has the same bits on all processes. Tensors of one dtype are concatenated, so there is one all-reduce for
    each dtype, however many weights there are. A loss next to its gradients costs four bytes and no additional
    all-reduce. It works in eager mode and inside `compile_step`. Collective: call it on every process.

    Args:
        tree: A tree of tensors, such as ``(loss, grads)``, with equal structure, shapes and dtypes on every process.
        group: The process group, or a mesh of one dimension.
        weight: The weight of this process in the mean, for batches of unequal sizes. The weights must sum to 1.
            Default None means 1 / the number of processes.

    Returns:
        A tree with the structure, shapes and dtypes of `tree`.

    Numerics: Each term is scaled first and summed in the dtype of its tensor. The order of the sum depends on the
        number of processes.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> import dynlora_fn as dl
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> dl.parallel.all_reduce_mean({"w": torch.ones(2)}, dist.group.WORLD)
        {'w': tensor([1., 1.])}
        >>> dist.destroy_process_group()
    """
    weight = 1 / process_group(group).size() if weight is None else weight
    leaves, structure = tree_flatten(tree, is_leaf=lambda node: isinstance(node, ShardedFactors))
    buckets: dict[torch.dtype, list[int]] = defaultdict(list)
    for at, leaf in enumerate(leaves):
        if not isinstance(leaf, ShardedFactors):  # the backward pass has reduced gradients of sharded factors
            buckets[leaf.dtype].append(at)
    for members in buckets.values():
        bucket = torch.cat([leaves[at].flatten() for at in members]) * weight
        reduced: Tensor = functional_collectives.wait_tensor(functional_collectives.all_reduce(bucket, "sum", group))  # type: ignore[no-untyped-call]
        parts = torch.split(reduced, [leaves[at].numel() for at in members])
        for at, part in zip(members, parts, strict=True):
            leaves[at] = part.reshape(leaves[at].shape)
    return tree_unflatten(leaves, structure)
