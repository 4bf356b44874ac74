"""Check that all processes store the same state."""

from collections import Counter
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from dynlora_fn._core._collectives import all_gather
from dynlora_fn._core._torch import keystr, tree_flatten_with_path
from dynlora_fn.bases._types import Sharded
from dynlora_fn.parallel._shard import Group, is_under, process_group, shardings_in

# --- whether they agree


class DriftedError(RuntimeError):
    """Processes that must hold the same state do not."""


def check_replicas(state: Any, group: Group) -> None:
    """Returns if all processes hold the same bits, and otherwise raises on each of them, naming those that do not.

    It reads the state once and sends eight bytes for each tensor. Left out is what differs: sharded bases, and all that
    is by the name of sharded factors.

    Args:
        state: a tree of tensors.
        group: the processes, a group or a mesh of one dimension; all must ask.

    Raises:
        DriftedError: with the processes that differ from the majority, and the tensor in which the first of them does.
    """
    leaves = tree_flatten_with_path(state, is_leaf=lambda node: isinstance(node, Sharded))[0]
    shardings = shardings_in(state)
    replicated = [
        (keystr(path), leaf) for path, leaf in leaves if isinstance(leaf, Tensor) and not is_under(path, shardings)
    ]
    own = checksums([leaf for _, leaf in replicated])
    processes = process_group(group)
    every = all_gather(own[None], processes.size(), processes.group_name).tolist()
    states = Counter(map(tuple, every))
    if len(states) == 1:
        return
    common, count = states.most_common(1)[0]
    rule = "be the same on all processes"
    if 2 * count <= len(every):
        groups = [[rank for rank, one in enumerate(every) if tuple(one) == state] for state in states]
        raise DriftedError(f"`state` must {rule}, got {len(states)} different ones, by ranks: {groups}")
    drifted = [rank for rank, one in enumerate(every) if tuple(one) != common]
    first = next(at for at, pair in enumerate(zip(every[drifted[0]], common, strict=True)) if pair[0] != pair[1])
    names = f"rank{'s' if len(drifted) > 1 else ''} {', '.join(map(str, drifted))}"
    raise DriftedError(f"`state` must {rule}, got {names} with another, from {replicated[first][0]} on")


def checksums(leaves: list[Tensor]) -> Int[Tensor, " leaves"]:
    """One for each tensor, of its bits and their places: a bit that differs shows, and two numbers that are exchanged.

    ``sum((2 k + 1) bits[k])`` modulo ``2**64``: odd factors, so that no bit is lost.
    """
    made = [_checksum(leaf.detach()) for leaf in leaves]
    return torch.stack([one.to(made[0].device) for one in made])


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_AT_ONCE = 2**22  # numbers, so that their copies as 64-bit integers take 64 MB at most


def _checksum(leaf: Tensor) -> Tensor:
    bits = leaf.contiguous().view(_INTEGERS[leaf.element_size()]).flatten()
    total = torch.zeros((), dtype=torch.int64, device=leaf.device)
    for first, part in enumerate(torch.split(bits, _AT_ONCE)):
        factors = 2 * torch.arange(first * _AT_ONCE, first * _AT_ONCE + len(part), device=leaf.device) + 1
        total = total + (part.long() * factors).sum()
    return total
