"""Make the parameters of `init` from weights that are read one at a time.

Of each stack, one weight beside the result is in memory. The vectors of small weights are drawn together, because a
draw takes a hundred operations.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from dynlora_fn._core._dtypes import widest
from dynlora_fn._core._stacking import Stack
from dynlora_fn._core._torch import tree_leaves
from dynlora_fn._core._types import Factors, FrozenTensor, LowRank, Param
from dynlora_fn.bases._base import StoredBase, as_base
from dynlora_fn.bases._fold import fold
from dynlora_fn.bases._quantize import quantize_base
from dynlora_fn.bases._residual import Device, ResidualKind
from dynlora_fn.bases._stacks import stack_bases
from dynlora_fn.bases._torchao_tensors import from_torchao, is_torchao
from dynlora_fn.interop._parameters import is_opaque
from dynlora_fn.interop._targets import Target, as_matrices
from dynlora_fn.parallel._group import Group
from dynlora_fn.parallel._shard import shard
from dynlora_fn.switching._weight import BasisSlice, Start, first_slice, vectors_of

_BATCH = 2**20  # entries of small weights whose vectors are drawn together


class Settings(NamedTuple):
    """Those arguments of `init` that all parameters share."""

    seed: int
    start: Start
    base_dtype: torch.dtype | None
    base: object
    residual: ResidualKind
    residual_device: Device
    dtype: torch.dtype
    copy: bool
    group: "Group | None"


class Task(NamedTuple):
    """One parameter that is to be made."""

    name: str  # with an axis for each integer that varies, if it is a stack
    stack: Stack
    like: Tensor  # the first weight in the model, which may be without values
    target: Target | None  # None for a full-rank parameter
    is_frozen: bool

    @property
    def is_opaque(self) -> bool:
        """Whether it is passed unchanged, because a copy may lose what another library needs."""
        return self.target is None and self.is_frozen and is_opaque(self.like)

    @property
    def entries(self) -> int:
        return self.like.numel() * len(self.stack.members)


def make(
    tasks: Iterable[Task], read: Callable[[str], Tensor], settings: Settings, report: Callable[[int], None]
) -> Iterator[tuple[str, Param]]:
    """Yield each parameter with its name. `read` returns a weight of the model by its name."""
    for batch in _batches(tasks, most=_BATCH if settings.group is None else 0):
        yield from _make_batch(batch, read, settings, report)


def _batches(tasks: Iterable[Task], *, most: int) -> Iterator[list[Task]]:
    """Split tasks into lists of at most so many entries in all, or of one larger parameter."""
    batch: list[Task] = []
    entries = 0
    for task in tasks:
        if batch and entries + task.entries > most:
            yield batch
            batch, entries = [], 0
        batch.append(task)
        entries += task.entries
    if batch:
        yield batch


def _make_batch(
    batch: Sequence[Task], read: Callable[[str], Tensor], settings: Settings, report: Callable[[int], None]
) -> Iterator[tuple[str, Param]]:
    firsts = {task.name: _read(task, task.stack.members[0], read, settings) for task in batch}
    slices = {task.name: _slice(task, task.target, firsts[task.name], settings) for task in batch if task.target}
    vectors = dict(zip(slices, vectors_of([*slices.values()]), strict=True)) if slices else {}
    for task in batch:

        def member(at: int, task: Task = task) -> StoredBase:
            return _read(task, task.stack.members[at], read, settings) if at else firsts.pop(task.name)

        def done(task: Task = task) -> None:
            report(task.like.numel() * task.like.dtype.itemsize)

        if task.target is None:
            yield task.name, _full_rank(task, member, settings, done)
        else:
            factors, seed = _without_padding(vectors.pop(task.name), task.target), slices[task.name].seed
            make_base = _dense_base if _stays_dense(firsts[task.name], settings) else _base
            yield task.name, LowRank(make_base(task, task.target, member, factors, seed, settings, done), factors, seed)


def _read(task: Task, name: str, read: Callable[[str], Tensor], settings: Settings) -> StoredBase:
    """Return one weight: a target as its matrices, or in the codes of torchao."""
    tensor = read(name)
    if task.target is None:
        if task.is_opaque:
            return tensor
        return from_torchao(tensor, name=name).dequantize(tensor.dtype) if is_torchao(tensor) else tensor.detach()
    if not is_torchao(tensor):
        return as_matrices(tensor.detach(), task.target)
    if task.target.parts > 1 or task.target.is_spatial:
        raise ValueError(
            f"`targets` matches {task.name!r}, a tensor of torchao that is fused or the weight of a convolution; "
            "use only matrices of torchao, or dequantize it first"
        )
    return from_torchao(tensor, residual=settings.residual, residual_device=settings.residual_device, name=name)


def _full_rank(
    task: Task, member: Callable[[int], StoredBase], settings: Settings, done: Callable[[], None]
) -> Tensor | FrozenTensor:
    def read(at: int) -> StoredBase:
        tensor = member(at)
        done()
        return tensor

    if task.is_opaque or not (settings.copy or task.stack.shape):
        tensor = read(0)
    else:
        tensor = stack_bases(map(read, range(len(task.stack.members))), task.stack.shape)
    return FrozenTensor(tensor) if task.is_frozen else tensor


def _slice(task: Task, target: Target, first: StoredBase, settings: Settings) -> BasisSlice:
    """Name the first vectors of a target, with a seed for each matrix from the name and the position in its weight."""
    *inner, out_features, in_features = as_base(first).shape
    count = prod(inner)
    names = [name if count == 1 else f"{name}[{position}]" for name in task.stack.members for position in range(count)]
    seeds = [_weight_seed(settings.seed, name) for name in names]
    seed = torch.tensor(seeds, device=tree_leaves(first)[0].device).reshape((*task.stack.shape, *inner))
    return first_slice(seed, (out_features, in_features), target.rank, settings.start, settings.dtype)


def _weight_seed(seed: int, name: str) -> int:
    """Return 63 bits that depend on the name, and not on other targets or on the stacking."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


def _without_padding(factors: Factors, target: Target) -> Factors:
    if target.padding is None or target.parts > 1:
        return factors
    is_padding = torch.arange(factors.b.shape[-2], device=factors.b.device) == target.padding
    return Factors(factors.b.masked_fill(is_padding[:, None], 0), factors.a)


def _stays_dense(first: StoredBase, settings: Settings) -> bool:
    return isinstance(first, Tensor) and settings.base is None and settings.group is None


def _dense_base(
    task: Task,
    target: Target,
    member: Callable[[int], Tensor],
    factors: Factors,
    seed: Tensor,
    settings: Settings,
    done: Callable[[], None],
) -> Tensor:
    """Return ``weight - b @ a / rank`` of all members, written into one tensor."""
    dtype, count = settings.base_dtype or task.like.dtype, len(task.stack.members)
    b, a = (leaf.reshape(count, *leaf.shape[len(task.stack.shape) :]) for leaf in factors)

    def fold_into(base: Tensor | None, at: int, weight: Tensor) -> Tensor:
        base = weight.new_empty((count, *weight.shape), dtype=dtype) if base is None else base
        if settings.start == "lora":
            base[at].copy_(weight)
        else:
            fold(weight, -b[at], a[at], rank=target.rank, out=base[at])
        done()
        return base

    if settings.start == "lora" and not (settings.copy or task.stack.shape):
        base = member(0).to(dtype).contiguous()
        done()
        return base
    base = None
    for at in range(count):
        base = fold_into(base, at, member(at))
    assert base is not None
    return base.reshape((*task.stack.shape, *base.shape[1:]))


def _base(
    task: Task,
    target: Target,
    member: Callable[[int], StoredBase],
    factors: Factors,
    seed: Tensor,
    settings: Settings,
    done: Callable[[], None],
) -> StoredBase:
    """Return the bases of all members in their format, sharded if a group is passed."""
    count = len(task.stack.members)
    b, a, seeds = (leaf.reshape(count, *leaf.shape[len(task.stack.shape) :]) for leaf in (*factors, seed))

    def converted(at: int) -> StoredBase:
        base = _converted(task, target, LowRank(member(at), Factors(b[at], a[at]), seeds[at]), settings)
        done()
        return base

    return stack_bases(map(converted, range(count)), task.stack.shape) if task.stack.shape else converted(0)


def _converted(task: Task, target: Target, param: LowRank, settings: Settings) -> StoredBase:
    (weight, (b, a), _), base = param, param.base
    if isinstance(weight, Tensor):
        # A base that is quantized afterwards is not rounded here, so that it is rounded only once.
        dtype = settings.base_dtype or (task.like.dtype if settings.base is None else widest(task.like.dtype))
        base = weight.to(dtype) if settings.start == "lora" else fold(weight, -b, a, rank=target.rank, dtype=dtype)
    elif settings.start != "lora":
        base = as_base(weight).fold(-b, a, rank=target.rank, name=task.name)
    if settings.base is not None:
        base = quantize_base(
            task.name, base, settings.base, settings.residual, settings.residual_device, task.like.dtype
        )
    if settings.group is not None:
        base = shard({task.name: param._replace(base=base)}, settings.group)[task.name].base
    return base
