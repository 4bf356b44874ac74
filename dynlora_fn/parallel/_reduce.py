"""Average gradients over processes."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dynlora_fn._core._torch import functional_collectives, tree_flatten_with_path, tree_unflatten
from dynlora_fn._core._types import Frozen
from dynlora_fn.bases._sharded import factor_shardings
from dynlora_fn.parallel._shard import Group, is_under, process_group


def all_reduce_mean(
    tree: Any, group: Group, *, weight: float | None = None, frozen: Mapping[str, Frozen | Tensor] | None = None
) -> Any:
    """The mean of each tensor over the processes, the same bits on all of them: one all-reduce for each dtype.

    Tensors of a dtype travel as one, so that a step sends one message however many weights there are. It goes wherever
    the step goes, inside of `compile_step` too. A loss beside its gradients costs four bytes and no message.

    Args:
        tree: of tensors, such as ``(loss, grads)``; the same structure, shapes and dtypes on every process.
        group: the processes, a group or a mesh of one dimension.
        weight: of this process in the mean, all of them adding up to 1, for batches of unequal sizes; 1 / their number
            unless given.
        frozen: the rest of the parameters, where factors are sharded: what stands under their names in `tree` has been
            reduced already, and stays.

    Numerics: each term is scaled first and summed in its own dtype, in an order that depends on the number of
    processes.
    """
    weight = 1 / process_group(group).size() if weight is None else weight
    shardings = factor_shardings(frozen or {})
    paths, structure = tree_flatten_with_path(tree)
    leaves = [leaf for _, leaf in paths]
    buckets: dict[torch.dtype, list[int]] = defaultdict(list)
    for at, (path, leaf) in enumerate(paths):
        if not is_under(path, shardings):
            buckets[leaf.dtype].append(at)
    for members in buckets.values():
        bucket = torch.cat([leaves[at].flatten() for at in members]) * weight
        reduced: Tensor = functional_collectives.wait_tensor(functional_collectives.all_reduce(bucket, "sum", group))  # type: ignore[no-untyped-call]
        parts = torch.split(reduced, [leaves[at].numel() for at in members])
        for at, part in zip(members, parts, strict=True):
            leaves[at] = part.reshape(leaves[at].shape)
    return tree_unflatten(leaves, structure)
