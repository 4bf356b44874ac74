"""Create the parameters of `init` from weights that are read one at a time.

For each stack, one weight is in memory besides the result. The vectors of small weights are drawn together, because a
draw takes a hundred operations.
"""

import hashlib
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynlora_fn._core._batches import batches
from dynlora_fn._core._dtypes import widest
from dynlora_fn._core._stacking import Stack, unbind
from dynlora_fn._core._torch import tree_leaves, tree_map
from dynlora_fn._core._tree import whole_factors
from dynlora_fn._core._types import (
    AnyFactors,
    Factors,
    FixedSide,
    FrozenTensor,
    LowRank,
    OneSidedFactors,
    Param,
    with_alpha,
)
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
from dynlora_fn.switching._weight import BasisSlice, Vectors, first_slice, vectors_of

_BATCH = 2**20  # entries of small weights whose vectors are drawn together
_TOGETHER = 2**18  # entries of small weights that are folded into together


class Settings(NamedTuple):
    """The arguments of `init` that all parameters share."""

    seed: int
    start: Vectors
    base_dtype: torch.dtype | None
    base: object
    residual: ResidualKind
    residual_device: Device
    dtype: torch.dtype
    copy: bool
    group: Any  # a `Group` or None: `get_type_hints` cannot read the alias

    @property
    def is_zero(self) -> bool:
        """Whether `b` starts with zeros, so that each base equals its weight."""
        return self.start != "switchlora"

    def typed(self, factors: Factors, alpha: float) -> AnyFactors:
        """Return factors of the type for this alpha and the trained sides."""
        if self.start == "orthonormal":
            return OneSidedFactors(factors.b, factors.a, FixedSide(factors.a.shape[-1], alpha))
        return with_alpha(factors, alpha)


class Task(NamedTuple):
    """One parameter to create, or several small parameters to create together."""

    name: str
    stack: Stack
    like: Tensor  # the first weight in the model, which may be on the meta device
    target: Target | None  # None for a full-rank parameter
    is_frozen: bool

    @property
    def is_split(self) -> bool:
        """Whether each member becomes a separate parameter after they are made together."""
        return not self.stack.shape and len(self.stack.members) > 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The leading axes of the tensors while they are made."""
        return (len(self.stack.members),) if self.is_split else self.stack.shape

    @property
    def is_opaque(self) -> bool:
        """Whether the tensor is used without a copy.

        A copy may lose attributes that another library needs.
        """
        return self.target is None and self.is_frozen and is_opaque(self.like)

    @property
    def entries(self) -> int:
        return self.like.numel() * len(self.stack.members)

    @property
    def bytes(self) -> int:
        return self.entries * self.like.dtype.itemsize


def make(
    tasks: Iterable[Task], read: Callable[[str], Tensor], settings: Settings, report: Callable[[int], None]
) -> Iterator[tuple[str, Param]]:
    """Yield each parameter with its name.

    Args:
        tasks: The parameters to create.
        read: A function that returns a weight of the model by its name.
        settings: The arguments of `init`.
        report: A function that is called with the bytes of each task that is done.
    """
    for batch in batches(tasks, lambda task: task.entries, most=_BATCH if settings.group is None else 0):
        yield from _make_batch(batch, read, settings, report)


def together(
    stacks: Mapping[str, Stack],
    keys: Mapping[str, Hashable],
    tensors: Mapping[str, Tensor],
    selected: Container[str],
    settings: Settings,
) -> dict[str, Stack]:
    """Return the stacks to create, where small targets with equal keys form one stack.

    The stack is split afterwards. Bases in low precision are created one by one, so that an error can name the weight.
    """
    is_plain = settings.base is None and settings.group is None and settings.copy
    new, unfilled = dict[str, Stack](), dict[Hashable, Stack]()
    for name, stack in stacks.items():
        is_small_target = is_plain and not stack.shape and name in selected and not is_torchao(tensors[name])
        most = _BATCH // max(tensors[name].numel(), 1) if is_small_target else 1
        if most < 2:
            new[name] = stack
            continue
        key = keys[name]
        if key not in unfilled:
            new[name] = unfilled[key] = Stack([], ())
        unfilled[key].members.append(name)
        if len(unfilled[key].members) == most:
            del unfilled[key]
    return new


def _make_batch(
    batch: Sequence[Task], read: Callable[[str], Tensor], settings: Settings, report: Callable[[int], None]
) -> Iterator[tuple[str, Param]]:
    firsts = {task.name: _read(task, task.stack.members[0], read, settings) for task in batch}
    slices = {task.name: _slice(task, task.target, firsts[task.name], settings) for task in batch if task.target}
    vectors = dict(zip(slices, vectors_of([*slices.values()]), strict=True)) if slices else {}
    for task in batch:

        def member(at: int, task: Task = task) -> StoredBase:
            return _read(task, task.stack.members[at], read, settings) if at else firsts.pop(task.name)

        param: Param
        if task.target is None:
            param = _full_rank(task, member, settings)
        else:
            factors, seed = _without_padding(vectors.pop(task.name), task.target), slices[task.name].seed
            is_dense = isinstance(firsts[task.name], Tensor) and settings.base is None and settings.group is None
            if is_dense:
                base = _dense_base(task, task.target, member, factors, settings)
            else:
                base = _base(task, task.target, member, factors, seed, settings)
            param = LowRank(base, settings.typed(factors, task.target.alpha), seed)
        if task.is_split:
            yield from zip(task.stack.members, (tree_map(torch.clone, one) for one in unbind(param)), strict=True)
        else:
            yield task.name, param
        report(task.bytes)


def _read(task: Task, name: str, read: Callable[[str], Tensor], settings: Settings) -> StoredBase:
    """Return one weight. A target has the form of matrices, or of torchao's codes."""
    tensor = read(name)
    if task.target is None:
        if task.is_opaque:
            return tensor
        if is_torchao(tensor):
            tensor = from_torchao(tensor, name=name).dequantize(tensor.dtype)
        return tensor.detach().to(task.like.dtype)  # `weights` may have another one
    if not is_torchao(tensor):
        return as_matrices(tensor.detach(), task.target)
    if task.target.parts > 1 or task.target.is_spatial:
        raise ValueError(
            f"`targets` matches {task.name!r}, a tensor of torchao that is fused or the weight of a convolution; "
            "use only matrices of torchao, or dequantize it first"
        )
    return from_torchao(tensor, residual=settings.residual, residual_device=settings.residual_device, name=name)


def _full_rank(task: Task, member: Callable[[int], StoredBase], settings: Settings) -> Tensor | FrozenTensor:
    if task.is_opaque or not (settings.copy or task.shape):
        tensor = member(0)
    else:
        tensor = stack_bases(map(member, range(len(task.stack.members))), task.shape)
    return FrozenTensor(tensor) if task.is_frozen else tensor


def _slice(task: Task, target: Target, first: StoredBase, settings: Settings) -> BasisSlice:
    """Return the slice with the first vectors of a target.

    The seed of each matrix depends on the name of the weight and on its position in the weight.
    """
    *inner, out_features, in_features = as_base(first).shape
    count = prod(inner)
    names = [name if count == 1 else f"{name}[{position}]" for name in task.stack.members for position in range(count)]
    seeds = [_weight_seed(settings.seed, name) for name in names]
    seed = torch.tensor(seeds, device=tree_leaves(first)[0].device).reshape((*task.shape, *inner))
    shape = out_features, in_features
    return first_slice(seed, shape, target.rank, settings.start, settings.dtype, alpha=target.alpha)


def _weight_seed(seed: int, name: str) -> int:
    """Return a seed of 63 bits that depends only on the seed of `init` and the name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


def _without_padding(factors: Factors, target: Target) -> Factors:
    if target.padding is None or target.parts > 1:
        return factors
    is_padding = torch.arange(factors.b.shape[-2], device=factors.b.device) == target.padding
    return Factors(factors.b.masked_fill(is_padding[:, None], 0), factors.a)


def _dense_base(
    task: Task, target: Target, member: Callable[[int], Tensor], factors: Factors, settings: Settings
) -> Tensor:
    """Return the bases of all members, written into one tensor.

    Small members are folded together.
    """
    dtype, count = settings.base_dtype or task.like.dtype, len(task.stack.members)
    if settings.is_zero and not (settings.copy or task.shape):
        return member(0).to(dtype).contiguous()
    b, a = (leaf.reshape(count, *leaf.shape[len(task.shape) :]) for leaf in factors)
    step = max(_TOGETHER // max(task.like.numel(), 1), 1)
    bases: list[Tensor] = []

    def fold_some(start: int) -> None:
        weights = [member(at) for at in range(count)[start : start + step]]
        if not bases:
            bases.append(weights[0].new_empty((count, *weights[0].shape), dtype=dtype))
        if len({weight.dtype for weight in weights}) == 1:  # weights of different dtypes are summed one by one
            weights = [torch.stack(weights) if len(weights) > 1 else weights[0][None]]
        else:
            weights = [weight[None] for weight in weights]
        for weight in weights:
            here = slice(start, start + len(weight))
            if settings.is_zero:
                bases[0][here] = weight
            else:
                fold(weight, -b[here], a[here], divisor=target.divisor, out=bases[0][here])
            start = here.stop

    for start in range(0, count, step):
        fold_some(start)
    (base,) = bases
    return base.reshape((*task.shape, *base.shape[1:]))


def _base(
    task: Task, target: Target, member: Callable[[int], StoredBase], factors: Factors, seed: Tensor, settings: Settings
) -> StoredBase:
    """Return the bases of all members in their format, sharded if a group is passed."""
    count = len(task.stack.members)
    b, a, seeds = (leaf.reshape(count, *leaf.shape[len(task.shape) :]) for leaf in (*factors, seed))

    def converted(at: int) -> StoredBase:
        return _converted(task, target, LowRank(member(at), Factors(b[at], a[at]), seeds[at]), settings)

    return stack_bases(map(converted, range(count)), task.shape) if task.shape else converted(0)


def _converted(task: Task, target: Target, param: LowRank, settings: Settings) -> StoredBase:
    weight, (b, a), base = param.base, whole_factors(param), param.base
    if isinstance(weight, Tensor):
        # A base that is quantized below keeps the wider dtype here, so that it is rounded only once.
        dtype = settings.base_dtype or (task.like.dtype if settings.base is None else widest(task.like.dtype))
        is_zero, divisor = settings.is_zero, target.divisor
        base = weight.to(dtype) if is_zero else fold(weight, -b, a, divisor=divisor, dtype=dtype)
    elif not settings.is_zero:
        base = as_base(weight).fold(-b, a, divisor=target.divisor, name=task.name)
    if settings.base is not None:
        base = quantize_base(
            task.name, base, settings.base, settings.residual, settings.residual_device, task.like.dtype
        )
    if settings.group is not None:
        base = _shard(task.name, param._replace(base=base), settings.group)
    return base


def _shard(name: str, param: LowRank, group: Group) -> StoredBase:
    sharded = shard({name: param}, group)[name]
    assert isinstance(sharded, LowRank)
    return sharded.base
