"""Fold a low-rank difference into a dense base."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from dynlora_fn._core._dtypes import widest, without_autocast
from dynlora_fn._core._torch import are_immediate

# A compiler fuses outer products into one pass over the base, in place if the base is donated. It cannot do this for a
# matrix product, which is faster for many vectors.
_MOST_OUTER_PRODUCTS = 32
# The entries of a block of the base. All outer products are added to a block while it is in the cache.
_BLOCK = 2**18


def fold(
    base: Float[Tensor, "*stack out in"],
    left: Float[Tensor, "*stack out count"],
    right: Float[Tensor, "*stack count in"],
    *,
    divisor: float,
    dtype: torch.dtype | None = None,
    out: Float[Tensor, "*stack out in"] | None = None,
) -> Float[Tensor, "*stack out in"]:
    """Return ``base + left @ right / divisor`` in memory of its dtype, rounded once.

    Args:
        base: The dense base.
        left: The left factor of the difference.
        right: The right factor of the difference.
        divisor: The divisor of the weight, ``rank / alpha``.
        dtype: The dtype of the result. Default None means the dtype of `out`, or of `base` without `out`.
        out: A contiguous tensor to write the result into. It may be `base`. Default None means newly allocated memory.

    Numerics: The sum is computed in the widest dtype of `base`, `left` and the result, at least in float32. Autocast
        does not apply, because a fold changes a weight and not an activation. Up to 32 vectors are added as outer
        products in that dtype. More vectors are one matrix product. On CUDA it has the precision that
        `torch.set_float32_matmul_precision` allows. A fold rounds every entry of a bfloat16 base, with a relative
        error of up to 2**-9.
    """
    if dtype is None:
        dtype = base.dtype if out is None else out.dtype
    wide = widest(base.dtype, left.dtype, right.dtype, dtype)
    left, right = left.to(wide) / divisor, right.to(wide)
    if base.is_cpu and left.shape[-1] and _is_of_shape(base, left, right) and are_immediate([base, left, right]):
        result = base.new_empty(base.shape, dtype=dtype) if out is None else out
        _fold_in_blocks(result, base, left, right)
        return result
    result = _fold(base.to(wide), left, right).to(dtype)
    return result if out is None else out.copy_(result)


def _is_of_shape(base: Tensor, left: Tensor, right: Tensor) -> bool:
    return base.shape == (*left.shape[:-1], right.shape[-1]) == (*right.shape[:-2], *base.shape[-2:])


def _fold(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    if left.shape[-1] > _MOST_OUTER_PRODUCTS:
        with without_autocast(total.device.type):
            return total + left @ right
    for k in range(left.shape[-1]):
        total = total + left[..., :, k, None] * right[..., k, None, :]
    return total


def _fold_in_blocks(result: Tensor, base: Tensor, left: Tensor, right: Tensor) -> None:
    """Write the result of `_fold` into a tensor, which may be the base.

    This takes additional memory for one or two blocks, or for one product of more than 32 vectors.
    """
    if left.shape[-1] > _MOST_OUTER_PRODUCTS:  # not in blocks, because the product of a block may have other bits
        with without_autocast(base.device.type):
            torch.add(base, left @ right, out=result)
        return
    stack = base.shape[:-2].numel()
    result = result.view(stack, *base.shape[-2:])
    base, left, right = (tensor.reshape(stack, *tensor.shape[-2:]) for tensor in (base, left, right))
    for members, rows in _blocks(base.shape):
        block, before, b, a = result[members, rows], base[members, rows], left[members, rows], right[members]
        total = block.copy_(before) if block.dtype == left.dtype else before.to(left.dtype, copy=True)
        product = torch.empty_like(total)
        # Not `addcmul_`, which rounds only once for a product and its sum.
        for column, row in zip(b[..., None].unbind(-2), a[..., None, :, :].unbind(-2), strict=True):
            total.add_(torch.mul(column, row, out=product))
        if total is not block:
            block.copy_(total)


def _blocks(shape: torch.Size) -> Iterator[tuple[slice, slice]]:
    """Yield the members and the rows of each block of a stack.

    A block has several members with all rows, or some rows of one member.
    """
    stack, out_features, in_features = shape
    members = max(_BLOCK // max(out_features * in_features, 1), 1)
    rows = max(_BLOCK // max(in_features, 1), 1)
    for member in range(0, stack, members):
        for row in range(0, out_features, rows):
            yield slice(member, member + members), slice(row, row + rows)
