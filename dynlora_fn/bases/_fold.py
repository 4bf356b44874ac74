"""Fold a low-rank difference into a dense base."""

import torch
from jaxtyping import Float
from torch import Tensor

from dynlora_fn._core._dtypes import widest, without_autocast

# A compiler fuses outer products into one pass over the base, in place if the base is donated. It does neither for a
# matrix product, but that is faster for many vectors.
_MOST_OUTER_PRODUCTS = 32


def fold(
    base: Float[Tensor, "*stack out in"],
    left: Float[Tensor, "*stack out count"],
    right: Float[Tensor, "*stack count in"],
    *,
    rank: int,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "*stack out in"]:
    """Return ``base + left @ right / rank``, rounded once.

    Args:
        base: The dense base.
        left: The left factor of the difference.
        right: The right factor of the difference.
        rank: The rank of the weight, which is the divisor.
        dtype: The dtype of the result. Default None means the dtype of `base`.

    Numerics: The sum is computed in the widest of all these dtypes, and at least in float32. Autocast does not apply,
        because a fold changes a weight and not an activation. Up to 32 vectors are added as outer products, exact to
        that dtype. More vectors are one matrix product, with the precision on CUDA that
        `torch.set_float32_matmul_precision` allows. A fold rounds every entry of a bfloat16 base, by up to 2**-9 of it.
    """
    dtype = base.dtype if dtype is None else dtype
    wide = widest(base.dtype, left.dtype, dtype)
    left, right, total = left.to(wide) / rank, right.to(wide), base.to(wide)
    if left.shape[-1] > _MOST_OUTER_PRODUCTS:
        with without_autocast(base.device.type):
            return (total + left @ right).to(dtype)
    for k in range(left.shape[-1]):
        total = total + left[..., :, k, None] * right[..., k, None, :]
    return total.to(dtype)
