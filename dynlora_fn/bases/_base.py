"""Dequantize any base, and fold a low-rank difference into any base."""

from typing import overload

import torch
from torch import Tensor

from dynlora_fn._core._types import Factors
from dynlora_fn.bases._flatten import flatten_base, gather_codes
from dynlora_fn.bases._fold import fold
from dynlora_fn.bases._formats import Codes, code_tensors, codes_from_tensors, kind_of, residual_from_tensors
from dynlora_fn.bases._quantized import LocalBaseT
from dynlora_fn.bases._types import Base, Deferred, FoldedBase, Quantized, Sharded, Transposed


def plain_dtype(base: Base) -> torch.dtype:
    """That of a base in full precision; of codes, float32."""
    held = base.base if isinstance(base, Sharded) else base
    return held.dtype if isinstance(held, Tensor) else torch.float32


def dequantize(base: Codes | Quantized | Sharded | Transposed, dtype: torch.dtype) -> Tensor:
    """What products see of a base: not its residual. Opaque to a compiler where that takes a copy."""
    if isinstance(base, Transposed):
        return dequantize(base.base, dtype).mT
    codes = gather_codes(*flatten_base(base)) if isinstance(base, Quantized | Sharded) else base
    if isinstance(codes, Tensor) and codes.dtype == dtype:
        return codes
    dense: Tensor = torch.ops.dynlora_fn.dequantize(code_tensors(codes), kind_of(codes), dtype)
    return dense


@overload
def fold_base(base: LocalBaseT, left: Tensor, right: Tensor, *, rank: int, name: str) -> LocalBaseT: ...
@overload
def fold_base(base: FoldedBase, left: Tensor, right: Tensor, *, rank: int, name: str) -> FoldedBase: ...
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
        own = left if base.sharding.columns else left[..., base.sharding.local_rows, :]  # `left` is sharded as `b` is
        return base._replace(base=fold_base(base.base, own, right, rank=rank, name=name))
    codes, kind = code_tensors(base.codes), kind_of(base.codes)
    new = torch.ops.dynlora_fn.fold_codes(
        codes, kind, code_tensors(base.residual), left.detach(), right.detach(), rank, name
    )
    return Quantized(codes_from_tensors(kind, new[: len(codes)]), residual_from_tensors(new[len(codes) :]), base.like)


def _deferred(base: Deferred, left: Tensor, right: Tensor, *, rank: int, name: str) -> Deferred:
    """The products wait behind those that do already, and as many of the oldest are folded: none are lost."""
    count, (b, a) = left.shape[-1], base.pending
    if count > b.shape[-1]:
        rule = "be at least as many as one fold brings"
        raise ValueError(f"`vectors` of deferred {name!r} must {rule}, got {b.shape[-1]} for {count}")
    folded = fold_base(base.base, b[..., :count], a[..., :count, :], rank=rank, name=name)
    pending = torch.cat([b[..., count:], left.to(b.dtype)], -1), torch.cat([a[..., count:, :], right.to(a.dtype)], -2)
    return Deferred(folded, Factors(*pending))
