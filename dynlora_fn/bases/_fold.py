"""Fold a low-rank difference into a dense base."""

import torch
from jaxtyping import Float
from torch import Tensor

from dynlora_fn._core._dtypes import widest, without_autocast

# Compiled, outer products fuse into one pass over the base, in place where it is donated; a matrix product does neither
# but is the faster one where many vectors change at once.
_MOST_OUTER_PRODUCTS = 32


def fold(
    base: Float[Tensor, "*stack out in"],
    left: Float[Tensor, "*stack out count"],
    right: Float[Tensor, "*stack count in"],
    *,
    rank: int,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "*stack out in"]:
    """``base + left @ right / rank``, rounded once to `dtype`, that of the base unless given.

    Numerics: the sum is formed in the widest of all these dtypes, float32 at least, whatever autocast says: a fold
    changes the weight, not an activation. Up to 32 vectors it is a sum of outer products, exact to that dtype;
    beyond, one matrix product, whose precision on CUDA is what `torch.set_float32_matmul_precision` allows.
    A base in bfloat16 is rounded as a whole at each fold, by up to 2**-9 of each entry.
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
