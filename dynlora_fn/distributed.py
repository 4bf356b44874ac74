"""Data parallelism for a step that is written by hand: what is reduced, what that costs, and whether ranks agree.

Plans and incoming vectors are functions of the seed and the step, so that processes switch alike without a message:
gradients are all that they tell each other, and sharded bases.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.distributed import _functional_collectives as functional
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_unflatten

from dynlora_fn.bases import codes_on_rows, seen
from dynlora_fn.rows import all_gather
from dynlora_fn.sharding import Group, is_under, process_group, shardings_in
from dynlora_fn.types import Deferred, Factors, Frozen, Plans, Sharded, Sharding, Trainable, factor_shardings


def mean_over_ranks(
    tree: Any, group: Group, *, share: float | None = None, frozen: Mapping[str, Frozen | Tensor] | None = None
) -> Any:
    """The mean of each tensor over the processes, the same bits on all of them: one all-reduce for each dtype.

    Tensors of a dtype travel as one, so that a step sends one message however many weights there are. It goes wherever
    the step goes, inside of `compile_step` too. A loss beside its gradients costs four bytes and no message.

    Args:
        tree: of tensors, such as ``(loss, grads)``; the same structure, shapes and dtypes on every process.
        group: the processes, a group or a mesh of one dimension.
        share: of this process in the mean, all of them adding up to 1, for batches of unequal sizes; 1 / their number
            unless given.
        frozen: the rest of the parameters, where factors are sharded: what stands under their names in `tree` has been
            reduced already, and stays.

    Numerics: each term is scaled first and summed in its own dtype, in an order that depends on the number of
    processes.
    """
    share = 1 / process_group(group).size() if share is None else share
    shardings = factor_shardings(frozen or {})
    paths, structure = tree_flatten_with_path(tree)
    leaves = [leaf for _, leaf in paths]
    buckets: dict[torch.dtype, list[int]] = defaultdict(list)
    for at, (path, leaf) in enumerate(paths):
        if not is_under(path, shardings):
            buckets[leaf.dtype].append(at)
    for members in buckets.values():
        bucket = torch.cat([leaves[at].flatten() for at in members]) * share
        reduced: Tensor = functional.wait_tensor(functional.all_reduce(bucket, "sum", group))  # type: ignore[no-untyped-call]
        parts = torch.split(reduced, [leaves[at].numel() for at in members])
        for at, part in zip(members, parts, strict=True):
            leaves[at] = part.reshape(leaves[at].shape)
    return tree_unflatten(leaves, structure)


class WireBytes(NamedTuple):
    """Bytes of a step that processes reduce, gather and scatter, by kind. By the ring algorithms, each of n processes
    sends ``2 (n - 1) / n`` of what is reduced and ``(n - 1) / n`` of what is gathered or scattered. Nothing is sent for
    switching, unless factors are sharded."""

    factors: int  # gradients, reduced
    full_rank: int  # likewise
    bases: int  # gathered
    gathered: int = 0  # sharded factors
    scattered: int = 0  # their gradients, reduced
    switched: int = 0  # rows of theirs, gathered to be folded into bases

    @property
    def reduced(self) -> int:
        return self.factors + self.full_rank


def wire_bytes(
    trainable: Trainable,
    frozen: Mapping[str, Frozen | Tensor] | None = None,
    *,
    gathers: int = 2,
    plan: Plans | None = None,
) -> WireBytes:
    """What data-parallel processes reduce and gather in a step, from the shapes and dtypes of its tensors alone.

    Args:
        trainable: what gradients are taken of.
        frozen: the rest, of which sharded bases are gathered.
        gathers: of each base in a step, and of sharded factors: two for each backward pass, three where `remat`
            computes its block again.
        plan: of a step that switches.

    Example:
        >>> from torch import nn
        >>> import dynlora_fn as dl
        >>> params = dl.init(nn.Linear(64, 64), rank=8, seed=0, targets=["weight"])
        >>> dl.wire_bytes(dl.partition(params).trainable)  # 4,352 by full-rank training
        WireBytes(factors=4096, full_rank=256, bases=0, gathered=0, scattered=0, switched=0)
    """
    shardings = factor_shardings(frozen or {})
    whole = [leaf for name, leaf in trainable.items() if isinstance(leaf, Factors) and name not in shardings]
    full_rank = [leaf for leaf in trainable.values() if isinstance(leaf, Tensor)]
    sharded = [_sharded(leaf.base) for leaf in (frozen or {}).values() if isinstance(leaf, Frozen)]
    bases = sum(_gathered_bytes(base) for base in sharded if base is not None)
    shares = own = 0
    for name, sharding in shardings.items():
        leaf = trainable[name]
        assert isinstance(leaf, Factors)
        shares += _padded_bytes(leaf.b, sharding) + _padded_bytes(leaf.a.mT, sharding.of_columns)
        if plan and name in plan:
            vectors = sum(side.slots.shape[-1] for side in (plan[name].b, plan[name].a))
            own += _padded_bytes(leaf.a.mT, sharding.of_columns) // leaf.a.shape[-2] * vectors
    return WireBytes(_bytes(whole), _bytes(full_rank), gathers * bases, gathers * shares, shares, own)


def _sharded(base: Any) -> Sharded | None:
    base = base.base if isinstance(base, Deferred) else base
    return base if isinstance(base, Sharded) else None


def _gathered_bytes(base: Sharded) -> int:
    """Of the shares of all processes, which are padded to the longest."""
    found = []

    def count(leaf: Tensor, sharding: Sharding) -> Tensor:
        found.append(_padded_bytes(leaf, sharding))
        return leaf

    layout, tensors = seen(base)
    codes_on_rows(count, layout.kind, tensors, base.sharding)
    return sum(found)


def _padded_bytes(leaf: Tensor, sharding: Sharding) -> int:
    each = leaf.shape[:-2].numel() * leaf.shape[-1] * leaf.element_size()
    return sharding.size * sharding.share * each


def _bytes(tree: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree))


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
