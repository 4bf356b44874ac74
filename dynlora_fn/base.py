"""How a frozen base is stored, and how a difference is folded into it."""

from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

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


def widest(*dtypes: torch.dtype) -> torch.dtype:
    """What sums of these are formed in: the widest of them, float32 at least."""
    return reduce(torch.promote_types, dtypes, torch.float32)


def inner_tensors(tensor: Tensor) -> list[Tensor]:
    """Those that hold its memory: itself, or what is inside of a subclass such as torchao's."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [inner for name in names for inner in inner_tensors(getattr(tensor, name))]


class Autocast(NamedTuple):
    """The first arguments of `torch.autocast`."""

    device_type: str
    dtype: torch.dtype
    enabled: bool


def autocast_now(device_type: str) -> Autocast | None:
    """What autocast is set to; None where there is none, as on the meta device."""
    if not torch.amp.is_autocast_available(device_type):
        return None
    return Autocast(device_type, torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type))


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    if not torch.amp.is_autocast_available(device_type):  # the meta device
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
