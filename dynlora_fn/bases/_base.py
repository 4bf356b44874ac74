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
    """Return the dtype of a base in full precision, and float32 for any other base."""
    local = base.base if isinstance(base, Sharded) else base
    return local.dtype if isinstance(local, Tensor) else torch.float32


def dequantize(base: Codes | Quantized | Sharded | Transposed, dtype: torch.dtype) -> Tensor:
    """Return the dense weight that products read, without the residual.

    A conversion is one operation that a compiler cannot look into, so only one dense weight is alive at a time.
    Collective if the base is sharded: call it on every process.
    """
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
    """Fold a low-rank difference into a base: ``base + left @ right / rank``.

    The result has the type and storage format of `base`. See `fold` for a dense base and `quantize` for the residual.

    Args:
        base: The base.
        left: The left factor of the difference, (*stack, out, count). For a sharded base it may have only the rows of
            this process.
        right: The right factor of the difference, (*stack, count, in).
        rank: The rank of the weight, which is the divisor.
        name: The name of the weight, for error messages.

    Raises:
        ValueError: If the new weight of a quantized base is not finite, in a compiled function too. Also if a fold has
            more vectors than a deferred base has room for.
    """
    if isinstance(base, Tensor):
        return fold(base, left, right, rank=rank)
    if isinstance(base, Deferred):
        return _deferred(base, left, right, rank=rank, name=name)
    if isinstance(base, Sharded):
        local_left = left[..., base.sharding.local_rows, :] if left.shape[-2] == base.sharding.rows else left
        return base._replace(base=fold_base(base.base, local_left, right, rank=rank, name=name))
    codes, kind = code_tensors(base.codes), kind_of(base.codes)
    new = torch.ops.dynlora_fn.fold_codes(
        codes, kind, code_tensors(base.residual), left.detach(), right.detach(), rank, name
    )
    return Quantized(codes_from_tensors(kind, new[: len(codes)]), residual_from_tensors(new[len(codes) :]), base.like)


def _deferred(base: Deferred, left: Tensor, right: Tensor, *, rank: int, name: str) -> Deferred:
    """Append pending vectors, and fold as many of the oldest into the base."""
    count, (b, a) = left.shape[-1], base.pending
    if count > b.shape[-1]:
        raise ValueError(
            f"`vectors` = {b.shape[-1]} of deferred {name!r} is less than the {count} vectors of one fold;"
            f" pass at least {count} to `defer`"
        )
    folded = fold_base(base.base, b[..., :count], a[..., :count, :], rank=rank, name=name)
    pending = torch.cat([b[..., count:], left.to(b.dtype)], -1), torch.cat([a[..., count:, :], right.to(a.dtype)], -2)
    return Deferred(folded, Factors(*pending))
