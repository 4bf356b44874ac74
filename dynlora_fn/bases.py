"""Bases as they are held: taken apart into members, dequantized, and folded into, at once or later."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, replace
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, overload

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from dynlora_fn.base import fold
from dynlora_fn.formats import built, flat, int8_residual, kind_of, shape_of
from dynlora_fn.opaque_codes import residual_of
from dynlora_fn.rows import gather
from dynlora_fn.shares import whole_factors
from dynlora_fn.types import (
    Base,
    Codes,
    Deferred,
    Factors,
    Held,
    LowRank,
    Quantized,
    Residual,
    Sharded,
    Sharding,
    Standing,
)

ResidualKind: TypeAlias = Literal["int8", "bfloat16"] | None
Device: TypeAlias = torch.device | str | None
HeldT = TypeVar("HeldT", bound="Tensor | Quantized")


class Transposed(NamedTuple):
    """``base.mT`` of codes, which have no transpose of their own. The base of a `LowRank` within one product."""

    base: Quantized | Sharded


def encode_rest(rest: Tensor, residual: ResidualKind, device: Device) -> Residual:
    """What codes miss, as a residual on a device."""
    if residual is None:
        return ()
    made = rest.to(torch.bfloat16) if residual == "bfloat16" else int8_residual(rest)
    return tree_map(lambda tensor: tensor.to(device or tensor.device), made)  # type: ignore[no-any-return]


def base_shape(base: Held) -> torch.Size:
    """Of the weight, (*stack, out, in)."""
    return shape_of(base if isinstance(base, Tensor) else base.codes)


def members(base: HeldT) -> Iterator[HeldT]:
    """The bases of a stack in row-major order: views."""
    stack = base_shape(base)[:-2]
    leaves, structure = tree_flatten(base)
    rows = [leaf.reshape(stack.numel(), *leaf.shape[len(stack) :]) for leaf in leaves]
    for number in range(stack.numel()):
        yield tree_unflatten([row[number] for row in rows], structure)


def restack(made: Sequence[HeldT], stack: Sequence[int]) -> HeldT:
    """The stack of these members: copies."""
    whole: HeldT = tree_map(lambda *leaves: torch.stack(leaves).reshape((*stack, *leaves[0].shape)), *made)
    return whole


class Layout(NamedTuple):
    """How tensors make up what products see of a base: constants alone, so that it goes along with them in a graph."""

    kind: str  # of the codes
    sharding: tuple[Any, ...] | None = None  # the fields of it, if these are rows of this process alone
    is_transposed: bool = False


def seen(base: Standing | Transposed) -> tuple[Layout, list[Tensor]]:
    """The tensors of a base that products see, as they are held; `whole_codes` makes codes of them."""
    if isinstance(base, Transposed):
        layout, tensors = seen(base.base)
        return layout._replace(is_transposed=True), tensors
    held, sharding = (base.base, astuple(base.sharding)) if isinstance(base, Sharded) else (base, None)
    codes = held.codes if isinstance(held, Quantized) else held
    return Layout(kind_of(codes), sharding), flat(codes)


def whole_codes(layout: Layout, tensors: Sequence[Tensor]) -> Codes:
    """The codes, gathered if need be, in the very bytes that the processes hold."""
    if layout.sharding:
        tensors = codes_on_rows(gather, layout.kind, tensors, Sharding(*layout.sharding))
    return built(layout.kind, tensors)


def whole(base: Standing) -> Held:
    """The base with all of its rows, and its residual with all of its own."""
    if not isinstance(base, Sharded):
        return base
    return on_rows(gather, base.base, base.sharding)


OnRows: TypeAlias = Callable[[Tensor, Sharding], Tensor]


def on_rows(change: OnRows, base: Held, sharding: Sharding) -> Held:
    """`change` of every tensor that has the base's rows."""
    if isinstance(base, Tensor):
        return change(base, sharding)
    kind, residual = kind_of(base.codes), tree_map(lambda leaf: change(leaf, sharding), base.residual)
    return base._replace(codes=built(kind, codes_on_rows(change, kind, flat(base.codes), sharding)), residual=residual)


def codes_on_rows(change: OnRows, kind: str, tensors: Sequence[Tensor], sharding: Sharding) -> list[Tensor]:
    """The same of the tensors of codes. nf4's scales, and their factors, lie row after row in a single axis: a process
    has as many as any other, and its own are the row that it has."""
    if kind != "nf4":
        return [change(tensor, sharding) for tensor in tensors]
    codes, *blocks, mean = tensors
    held = codes.shape[-2] // sharding.share  # the shares of all processes, or that of this one
    processes = replace(sharding, rows=sharding.size)
    blocks = [change(block.reshape(*block.shape[:-1], held, -1), processes).flatten(-2) for block in blocks]
    return [change(codes, sharding), *blocks, mean]


def plain_dtype(base: Base) -> torch.dtype:
    """That of a base in full precision; of codes, float32."""
    held = base.base if isinstance(base, Sharded) else base
    return held.dtype if isinstance(held, Tensor) else torch.float32


def dequantize(base: Codes | Quantized | Sharded | Transposed, dtype: torch.dtype) -> Tensor:
    """What products see of a base: not its residual. Opaque to a compiler where that takes a copy."""
    if isinstance(base, Transposed):
        return dequantize(base.base, dtype).mT
    codes = whole_codes(*seen(base)) if isinstance(base, Quantized | Sharded) else base
    if isinstance(codes, Tensor) and codes.dtype == dtype:
        return codes
    dense: Tensor = torch.ops.dynlora_fn.dequantize(flat(codes), kind_of(codes), dtype)
    return dense


@overload
def fold_base(base: HeldT, left: Tensor, right: Tensor, *, rank: int, name: str) -> HeldT: ...
@overload
def fold_base(base: Standing, left: Tensor, right: Tensor, *, rank: int, name: str) -> Standing: ...
@overload
def fold_base(base: Base, left: Tensor, right: Tensor, *, rank: int, name: str) -> Base: ...
def fold_base(base: Base, left: Tensor, right: Tensor, *, rank: int, name: str) -> Base:
    """``base + left @ right / rank`` in the base's own storage: see `fold`, and `quantize` for what a residual does.

    Raises:
        ValueError: if the sum of a quantized base is not finite, in a compiled function too; it names the weight.
    """
    if isinstance(base, Tensor):
        return fold(base, left, right, rank=rank)
    if isinstance(base, Deferred):
        return _deferred(base, left, right, rank=rank, name=name)
    if isinstance(base, Sharded):
        own = left if base.sharding.columns else left[..., base.sharding.own, :]  # `left` is sharded as `b` is
        return base._replace(base=fold_base(base.base, own, right, rank=rank, name=name))
    codes, kind = flat(base.codes), kind_of(base.codes)
    new = torch.ops.dynlora_fn.fold_codes(codes, kind, flat(base.residual), left.detach(), right.detach(), rank, name)
    return Quantized(built(kind, new[: len(codes)]), residual_of(new[len(codes) :]), base.like)


def _deferred(base: Deferred, left: Tensor, right: Tensor, *, rank: int, name: str) -> Deferred:
    """The products wait behind those that do already, and as many of the oldest are folded: none are lost."""
    count, (b, a) = left.shape[-1], base.pending
    if count > b.shape[-1]:
        rule = "be at least as many as one fold brings"
        raise ValueError(f"`vectors` of deferred {name!r} must {rule}, got {b.shape[-1]} for {count}")
    folded = fold_base(base.base, b[..., :count], a[..., :count, :], rank=rank, name=name)
    pending = torch.cat([b[..., count:], left.to(b.dtype)], -1), torch.cat([a[..., count:, :], right.to(a.dtype)], -2)
    return Deferred(folded, Factors(*pending))


class Settled(NamedTuple):
    """A weight, ``base + b @ a / rank``, in which nothing waits: the rank is that of its factors."""

    base: Standing
    factors: Factors


def standing(param: LowRank) -> Standing:
    """Its base, without what waits."""
    return param.base.base if isinstance(param.base, Deferred) else param.base


def settled_rank(param: LowRank) -> int:
    """Of its factors."""
    waiting = param.base.pending.b.shape[-1] if isinstance(param.base, Deferred) else 0
    return param.factors.b.shape[-1] + waiting


def settled(param: LowRank) -> Settled:
    """The same weight with what waits to be folded among its factors, as further slots of which none is trained.
    Sharded factors are gathered."""
    base, (b, a) = param.base, param.factors
    if sharding := param.factor_sharding:
        assert isinstance(base, Sharded)
        held = base._replace(sharding=replace(sharding, columns=None))
        return Settled(held, whole_factors(param.factors, sharding))
    if not isinstance(base, Deferred):
        return Settled(base, param.factors)
    waiting_b, waiting_a = (leaf.detach() for leaf in base.pending)
    b, a = torch.cat([b, waiting_b.to(b.dtype)], -1), torch.cat([a, waiting_a.to(a.dtype)], -2)
    return Settled(base.base, Factors(b * (b.shape[-1] / param.factors.b.shape[-1]), a))
