"""Check that all processes store the same state."""

from collections import Counter
from collections.abc import Callable, Sequence
from hashlib import sha256
from itertools import zip_longest
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional

from dynlora_fn._core._collectives import all_gather
from dynlora_fn._core._torch import device_of_collectives
from dynlora_fn.parallel._describe import describe
from dynlora_fn.parallel._group import Group, process_group


class DriftedError(RuntimeError):
    """The state differs between processes that must have the same state."""


def check_replicas(state: Any, group: Group) -> None:
    """Check that all processes have the same state, bit for bit.

    If states differ, every process raises the same error. The check compares types of nodes, keys and their order,
    shapes, dtypes, numbers, texts and the bits of tensors. Shards of bases, factors, gradients and moments differ
    between processes. For them it compares only the shapes of the unsharded tensors, the dtypes and the number of
    processes. The state is read once. Each process sends 32 bytes and eight for each tensor, and more if states differ.
    Collective: call it on every process.

    Args:
        state: A tree of tensors, numbers, texts, dtypes, shapes and None.
        group: The process group, or a mesh of one dimension.

    Raises:
        DriftedError: If the state differs. It names the processes that differ from the majority, and the first leaf
            that differs. Without a majority it lists the processes with equal states.
        TypeError: If a leaf of the state cannot be compared, such as an object or a `DTensor`.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> import dynlora_fn as dl
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> dl.parallel.check_replicas({"w": torch.ones(2), "step": 3}, dist.group.WORLD)
        >>> dist.destroy_process_group()
    """
    processes = process_group(group)
    lines, tensors, refused = describe(state)
    text = "\n".join(lines).encode()
    # A digest first: processes whose structures differ would send tensors of different sizes, at which gloo aborts.
    if len(set(_gather(_digest(text), processes))) > 1:
        structures = [tuple(data.decode().split("\n")) for data in _gather_bytes(text, processes)]
        _refuse(structures, lambda line, other: f"{line or 'nothing'} instead of {other or 'nothing'}", _PASS_ALIKE)
    if refused:
        raise TypeError(f"`state` cannot be compared: {refused[0]}; remove it, or pass its tensors, numbers and texts")
    if tensors:
        values = _gather(checksums([*tensors.values()]), processes)
        if len(set(values)) > 1:
            _refuse([(*zip(tensors, sums, strict=True),) for sums in values], lambda leaf, _: leaf[0], _RESUME)


_PASS_ALIKE, _RESUME = "pass the same state on every process, or resume from a checkpoint", "resume from a checkpoint"


def _refuse(states: Sequence[tuple[Any, ...]], name_first: Callable[[Any, Any], str], advice: str) -> None:
    """Raise the error that names the processes whose states differ, and where.

    Args:
        states: For each process, the entries of its state. At least two processes differ.
        name_first: A function from the first two entries that differ to a text. An entry is None if a state is shorter.
        advice: What the caller should do.
    """
    counts = Counter(states)
    common, count = counts.most_common(1)[0]
    drifted = [process for process, state in enumerate(states) if state != common]
    pairs = zip_longest(states[drifted[0]], common)
    first = next(name_first(entry, other) for entry, other in pairs if entry != other)
    if 2 * count > len(states):
        raise DriftedError(f"`state` of processes {drifted} differs from the majority, first at {first}; {advice}")
    groups = [[process for process, other in enumerate(states) if other == state] for state in counts]
    raise DriftedError(
        f"`state` differs between processes without a majority, first at {first}, and the processes with equal states"
        f" are {groups}; {advice}"
    )


def _gather(local: Tensor, group: torch.distributed.ProcessGroup) -> list[tuple[int, ...]]:
    """Return the integers of every process. Each must have the same number of them."""
    sent = local.to(device_of_collectives(group))[None]
    return [tuple(row) for row in all_gather(sent, group.size(), group.group_name).tolist()]


def _gather_bytes(data: bytes, group: torch.distributed.ProcessGroup) -> list[bytes]:
    """Return the bytes of every process. Their numbers may differ."""
    sizes = [size for (size,) in _gather(torch.tensor([len(data)]), group)]
    padded = functional.pad(torch.tensor(list(data), dtype=torch.uint8), (0, max(sizes) - len(data)))
    return [bytes(row[:size]) for row, size in zip(_gather(padded, group), sizes, strict=True)]


def _digest(data: bytes) -> Int[Tensor, " 4"]:
    digest = sha256(data).digest()
    return torch.tensor([int.from_bytes(digest[at : at + 8], "big", signed=True) for at in range(0, 32, 8)])


def checksums(leaves: list[Tensor]) -> Int[Tensor, " leaves"]:
    """Return a checksum of the bits of each tensor.

    With the bits of entry k as an integer and the finalizer of SplitMix64 as `mix` (doi:10.1145/2660193.2660195)::

        checksum = sum((2 * k + 1) * mix(bits[k])) modulo 2**64

    The finalizer is a bijection and the factors are odd, so every change of one entry changes the checksum. It depends
    on the order of the entries. Changes of several entries, such as two signs, cancel only by chance.
    """
    sums = [_checksum(leaf.detach()) for leaf in leaves]
    return torch.stack([total.to(sums[0].device) for total in sums])


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 2**20  # entries, so that the temporary 64-bit integers take 64 MB at most


def _checksum(leaf: Tensor) -> Tensor:
    leaf = leaf.resolve_conj().resolve_neg()
    leaf = torch.view_as_real(leaf) if leaf.is_complex() else leaf
    bits = leaf.contiguous().view(_INTEGERS[leaf.element_size()]).flatten()
    total = torch.zeros((), dtype=torch.int64, device=leaf.device)
    for first, part in enumerate(torch.split(bits, _CHUNK)):
        factors = 2 * torch.arange(first * _CHUNK, first * _CHUNK + len(part), device=leaf.device) + 1
        total = total + (_mix(part.long()) * factors).sum()
    return total


def _mix(x: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Apply the finalizer of SplitMix64. Zero stays zero."""
    x = (x ^ _shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)  # the constant as a signed integer
    x = (x ^ _shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shifted(x, 31)


def _shifted(x: Int[Tensor, " n"], count: int) -> Int[Tensor, " n"]:
    """Shift bits to the right and fill with zeros, not with the sign."""
    shifted: Tensor = (x >> count) & (2 ** (64 - count) - 1)
    return shifted
