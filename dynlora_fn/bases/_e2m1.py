"""4-bit floating point (e2m1) in blocks along the rows, for NVFP4 and MXFP4.

=======  ======================================================  =================================
format   value of an entry                                       entries in a block
=======  ======================================================  =================================
nvfp4    ``units * scale * factor``, scale in float8 e4m3         16, one factor for the weight
mxfp4    ``units * 2 ** (scale - 127)``                           32 (OCP Microscaling Formats v1.0)
=======  ======================================================  =================================

The layouts are the same as in torchao's NVFP4Tensor with one scale for the weight, and in its MXTensor with
``ScaleCalculationMode.EVEN``. Of torchao's modes, EVEN has the smallest error for normally distributed weights: 11.2 %.
FLOOR has 11.4 % and RCEIL 11.9 %. Both types are prototypes in torchao. They are imported only to create such a tensor,
so nothing else fails if torchao moves them. An existing tensor is recognized by the name of its type.
"""

from itertools import pairwise
from math import frexp
from typing import Any

import torch
from torch import Tensor

from dynlora_fn.bases._refusals import refuse

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = (*_MAGNITUDES, *(-value for value in _MAGNITUDES))
_MIDDLES = [(low + high) / 2 for low, high in pairwise(_MAGNITUDES)]
# The largest value rounded to each magnitude, except for the last. It is the middle of two magnitudes, or the float32
# just below if the next code is even.
_LIMITS = [middle - index % 2 * 2.0 ** (frexp(middle)[1] - 24) for index, middle in enumerate(_MIDDLES)]


def empty_packed(kind: str, name: str, weight: Tensor, block: int) -> Tensor:
    """Return uninitialized packed codes for one weight (out, in).

    Raises:
        ValueError: If `in` is not a multiple of the block size.
    """
    out_features, in_features = weight.shape
    if in_features % block:
        refuse("float4, shape", name=name, shape=tuple(weight.shape), kind=kind, block=block)
    return weight.new_empty((out_features, in_features // 2), dtype=torch.uint8)


def unpacked_shape(codes: Tensor) -> torch.Size:
    """Return the shape of the weight, (*stack, out, in)."""
    return torch.Size((*codes.shape[:-1], 2 * codes.shape[-1]))


def pack(units: Tensor) -> Tensor:
    """Round to 4-bit codes and pack two in each byte, the first in the low bits.

    Ties are rounded to the even code. Magnitudes above 6 become 6.
    """
    limits = torch.tensor(_LIMITS, dtype=torch.float32, device=units.device)
    codes = torch.bucketize(units.abs(), limits).to(torch.uint8)
    codes |= torch.signbit(units).to(torch.uint8) << 3
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack(codes: Tensor, factors: Tensor) -> Tensor:
    """Return the weight (*stack, out, in) in float32.

    `factors` (*stack, out, blocks) has the factor of each block.
    """
    indices = torch.stack([codes & 0b1111, codes >> 4], dim=-1)
    units = torch.tensor(_VALUES, dtype=torch.float32, device=indices.device)[indices.int()]
    values = units.reshape(*factors.shape, -1).mul_(factors[..., None])
    return values.reshape(unpacked_shape(codes))


def prototypes() -> tuple[Any, Any, Any]:
    """Return torchao's NVFP4Tensor, MXTensor and KernelPreference.

    Raises:
        ImportError: If torchao has moved its prototypes.
    """
    try:
        from dynlora_fn.bases._torchao import KernelPreference, MXTensor, NVFP4Tensor  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            "torchao's prototypes NVFP4Tensor and MXTensor are not in torchao.prototype.mx_formats, where torchao 0.18"
            f" has them ({error}); install that version"
        ) from error
    return NVFP4Tensor, MXTensor, KernelPreference
