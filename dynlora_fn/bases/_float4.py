"""NVFP4 and MXFP4: 4-bit floating point (e2m1) in blocks along the rows. Both are prototypes, as in torchao.

=======  ======================================================  =================================
format   an entry is                                             in blocks of
=======  ======================================================  =================================
nvfp4    ``units * scale * factor``, scale in float8 e4m3         16, one factor for the weight
mxfp4    ``units * 2 ** (scale - 127)``                           32 (OCP Microscaling Formats v1.0)
=======  ======================================================  =================================

The layouts are those of torchao's NVFP4Tensor with one scale for the weight, and of its MXTensor with
``ScaleCalculationMode.EVEN``. Of torchao's modes, EVEN has the smallest error for normally distributed weights:
11.2 %, where FLOOR has 11.4 % and RCEIL 11.9 %.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional


class NVFP4Codes(NamedTuple):
    """``codes * scale * factor`` in blocks of 16.

    They are the inner tensors of torchao's prototype NVFP4Tensor.
    """

    codes: UInt8[Tensor, "*stack out half_in"]  # two 4-bit codes in each byte, the first in the low bits
    scale: Float[Tensor, "*stack rows blocks"]  # float8_e4m3fn; (out, blocks), or in the tiles of tensor cores
    factor: Float[Tensor, "..."]  # float32, (*stack); (*stack, out, 1) once it was sharded


class MXFP4Codes(NamedTuple):
    """``codes * 2 ** (scale - 127)`` in blocks of 32.

    They are the inner tensors of torchao's prototype MXTensor.
    """

    codes: UInt8[Tensor, "*stack out half_in"]  # two 4-bit codes in each byte, the first in the low bits
    scale: UInt8[Tensor, "*stack out blocks"]  # the bits of float8_e8m0fnu, which Inductor does not support


BLOCKS = {"nvfp4": 16, "mxfp4": 32}
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = (*_MAGNITUDES, *(-value for value in _MAGNITUDES))
_LARGEST, _LARGEST_SCALE, _LEAST_SCALE = 6, 448, 2.0**-6  # largest value of e2m1; normal range of e4m3
_LEAST_FACTOR = 2.0**-100


def empty_codes(kind: str, name: str, weight: Tensor) -> NVFP4Codes | MXFP4Codes:
    """Return uninitialized codes for one weight.

    Raises:
        ValueError: If the blocks do not divide the rows of the weight.
    """
    (out_features, in_features), block = weight.shape, BLOCKS[kind]
    if in_features % block:
        raise ValueError(
            f"weight {name!r} of shape {tuple(weight.shape)} does not fit {kind}, a prototype in torchao, which needs a"
            f" multiple of {block} as `in`; use another format for it"
        )
    codes = weight.new_empty((out_features, in_features // 2), dtype=torch.uint8)
    dtype = torch.float8_e4m3fn if kind == "nvfp4" else torch.uint8
    scale = weight.new_empty((out_features, in_features // block), dtype=dtype)
    return (
        NVFP4Codes(codes, scale, scale.new_empty((), dtype=torch.float32))
        if kind == "nvfp4"
        else MXFP4Codes(codes, scale)
    )


def encode_nvfp4(weight: Tensor, like: NVFP4Codes) -> NVFP4Codes:
    """Encode a weight (out, in) in float32, with the factors and the tiling of `like`."""
    blocks = weight.reshape(len(weight), -1, BLOCKS["nvfp4"])  # (out, blocks, 16)
    largest = blocks.abs().amax(-1)
    factor = (largest.amax(-1, keepdim=True) if like.factor.ndim else largest.amax()) / (_LARGEST_SCALE * _LARGEST)
    # The inverse of a very small factor would be infinite. Scaling by a power of two changes no bit of the quotients.
    lift = torch.where(factor < _LEAST_FACTOR, 2.0**64, 1.0).to(torch.float32)
    lifted = (factor * lift).clamp_(min=_LEAST_FACTOR)
    scale = (largest * lift / _LARGEST / lifted).clamp_(_LEAST_SCALE, _LARGEST_SCALE).to(torch.float8_e4m3fn)
    inverse = (1.0 / lifted) / scale.to(torch.float32)
    codes = _pack((blocks * lift[..., None]).mul_(inverse[..., None]))
    is_swizzled = like.scale.shape != scale.shape
    return NVFP4Codes(codes.reshape(like.codes.shape), swizzled(scale) if is_swizzled else scale, factor)


def encode_mxfp4(weight: Tensor, like: MXFP4Codes) -> MXFP4Codes:
    """Encode a weight (out, in) in float32 in the layout of `like`."""
    blocks = weight.reshape(*like.scale.shape, -1)  # (out, blocks, 32)
    bits = blocks.abs().amax(-1).view(torch.int32)
    # The exponent of the largest value, rounded to one fractional bit, minus 2: the exponent of 6 in e2m1.
    scale = (((bits + 2**21) >> 23) - 2).clamp_(min=0)
    units = blocks / (scale << 23).view(torch.float32).clamp_(min=torch.finfo(torch.float32).tiny)[..., None]
    return MXFP4Codes(_pack(units).reshape(like.codes.shape), scale.to(torch.uint8))


def decode(codes: NVFP4Codes | MXFP4Codes) -> Tensor:
    """Decode to a dense weight (*stack, out, in) in float32."""
    *stack, out_features, half = codes.codes.shape
    if isinstance(codes, NVFP4Codes):
        scale, blocks = codes.scale, 2 * half // BLOCKS["nvfp4"]
        scale = scale if scale.shape[-1] == blocks else plain(scale, out_features, blocks)
        factor = codes.factor if has_factors_by_row(codes) else codes.factor[..., None, None]
        factors = factor * scale.to(torch.float32)
    else:
        factors = torch.pow(2.0, codes.scale.to(torch.float32) - 127)
    indices = torch.stack([codes.codes & 0b1111, codes.codes >> 4], dim=-1)
    units = torch.tensor(_VALUES, dtype=torch.float32, device=indices.device)[indices.int()]
    values = units.reshape(*factors.shape, -1).mul_(factors[..., None])
    return values.reshape(*stack, out_features, 2 * half)


def has_factors_by_row(codes: NVFP4Codes) -> bool:
    """Return whether each row has a factor, instead of one for the weight."""
    return codes.factor.ndim == codes.codes.ndim


def with_factors_by_row(codes: NVFP4Codes) -> NVFP4Codes:
    """Give each row a factor, so that rows are encoded independently from then on.

    The decoded values do not change. The scales are no longer in tiles.
    """
    if has_factors_by_row(codes):
        return codes
    *_, out_features, half = codes.codes.shape
    scale, blocks = codes.scale, 2 * half // BLOCKS["nvfp4"]
    scale = scale if scale.shape[-1] == blocks else plain(scale, out_features, blocks)
    factor = codes.factor[..., None, None].expand(*codes.codes.shape[:-1], 1).clone()
    return NVFP4Codes(codes.codes, scale, factor)


def with_one_factor(codes: NVFP4Codes) -> NVFP4Codes:
    """Reverse `with_factors_by_row` if the factors of all rows are equal.

    Other codes are returned unchanged.
    """
    first = codes.factor[..., :1, :]
    is_one = has_factors_by_row(codes) and bool((codes.factor == first).all())
    return codes._replace(factor=first[..., 0, 0].clone()) if is_one else codes


def _pack(units: Tensor) -> Tensor:
    """Round to 4-bit codes and pack two in each byte, the first in the low bits.

    Ties go to the even code. Values beyond 6 become 6.
    """
    codes = torch.bucketize(units.abs(), _limits().to(units.device)).to(torch.uint8)
    codes |= torch.signbit(units).to(torch.uint8) << 3
    return codes[..., ::2] | (codes[..., 1::2] << 4)


@lru_cache(maxsize=1)
def _limits() -> Tensor:
    """Return the largest value rounded to each magnitude, except for the last.

    It is the middle of two magnitudes, or the float just below if the next code is even.
    """
    values = torch.tensor(_MAGNITUDES, dtype=torch.float32)
    middle = (values[:-1] + values[1:]) / 2
    return torch.where(torch.arange(len(middle)) % 2 == 0, middle, torch.nextafter(middle, torch.tensor(0.0)))


# Tensor cores read scales in tiles of 128 rows and 4 blocks. torchao's NVFP4WeightOnlyConfig uses this layout.


def swizzled(scale: Tensor) -> Tensor:
    """Arrange scales (out, blocks) in tiles, padded with zeros.

    The result has the shape (32 * row tiles, 16 * column tiles).
    """
    rows, columns = scale.shape
    bits = functional.pad(scale.view(torch.uint8), (0, -columns % 4, 0, -rows % 128))
    tiles = rearrange(bits, "(R q p) (C c) -> (R C p q c)", q=4, p=32, c=4)
    return tiles.reshape(bits.shape[0] // 4, bits.shape[1] * 4).view(scale.dtype)


def plain(scale: Tensor, rows: int, columns: int) -> Tensor:
    """Reverse `swizzled`, for a stack too."""
    tiles = scale.view(torch.uint8).flatten(-2)
    high, wide = -(-rows // 128), -(-columns // 4)
    bits = rearrange(tiles, "... (R C p q c) -> ... (R q p) (C c)", R=high, C=wide, p=32, q=4, c=4)
    return bits[..., :rows, :columns].contiguous().view(scale.dtype)
