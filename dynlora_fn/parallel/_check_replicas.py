"""Check that all processes store the same state."""

from collections import Counter
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from dynlora_fn._core._collectives import all_gather
from dynlora_fn._core._torch import keystr, tree_flatten_with_path
from dynlora_fn._core._types import ShardedFactors
from dynlora_fn.bases._sharded import Sharded
from dynlora_fn.parallel._group import Group, process_group


class DriftedError(RuntimeError):
    """The state differs between processes that must have the same state."""


def check_replicas(state: Any, group: Group) -> None:
    """Check that all processes have the same state, bit for bit.

    If not, every process raises the same error. The state is read once, and each tensor costs eight bytes of
    communication. Sharded bases, factors, gradients and moments differ between processes and are skipped. Collective:
    call it on every process.

    Args:
        state: A tree of tensors.
        group: The process group, or a mesh of one dimension.

    Raises:
        DriftedError: If the state differs. It names the processes that differ from the majority, and the first tensor
            that differs. Without a majority it lists the processes with equal states.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> import dynlora_fn as dl
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> dl.parallel.check_replicas({"w": torch.ones(2)}, dist.group.WORLD)
        >>> dist.destroy_process_group()
    """
    leaves = tree_flatten_with_path(state, is_leaf=lambda node: isinstance(node, Sharded | ShardedFactors))[0]
    replicated = [(keystr(path), leaf) for path, leaf in leaves if isinstance(leaf, Tensor)]
    local = checksums([leaf for _, leaf in replicated])
    processes = process_group(group)
    gathered = all_gather(local[None], processes.size(), processes.group_name).tolist()
    states = Counter(map(tuple, gathered))
    if len(states) == 1:
        return
    common, count = states.most_common(1)[0]
    if 2 * count <= len(gathered):
        groups = [[process for process, sums in enumerate(gathered) if tuple(sums) == state] for state in states]
        raise DriftedError(
            f"`state` differs between processes without a majority, and the processes with equal states are {groups};"
            " resume from a checkpoint"
        )
    drifted = [process for process, sums in enumerate(gathered) if tuple(sums) != common]
    first = next(at for at, pair in enumerate(zip(gathered[drifted[0]], common, strict=True)) if pair[0] != pair[1])
    raise DriftedError(
        f"`state` of processes {drifted} differs from the majority, first at {replicated[first][0]};"
        " resume from a checkpoint"
    )


def checksums(leaves: list[Tensor]) -> Int[Tensor, " leaves"]:
    """Return a checksum of the bits of each tensor.

    It is ``sum((2 k + 1) bits[k])`` modulo ``2**64``, with the bits of entry k as an integer. The factors are odd, so
    every change of one entry changes it. It also depends on the order of the entries.
    """
    sums = [_checksum(leaf.detach()) for leaf in leaves]
    return torch.stack([total.to(sums[0].device) for total in sums])


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 2**22  # entries, so that the temporary 64-bit integers take 64 MB at most


def _checksum(leaf: Tensor) -> Tensor:
    bits = leaf.contiguous().view(_INTEGERS[leaf.element_size()]).flatten()
    total = torch.zeros((), dtype=torch.int64, device=leaf.device)
    for first, part in enumerate(torch.split(bits, _CHUNK)):
        factors = 2 * torch.arange(first * _CHUNK, first * _CHUNK + len(part), device=leaf.device) + 1
        total = total + (part.long() * factors).sum()
    return total
