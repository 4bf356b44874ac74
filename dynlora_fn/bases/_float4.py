"""NVFP4 and MXFP4: 4-bit floating point (e2m1) in blocks along the rows. Prototypes in torchao, and so here.

=======  ======================================================  =================================
format   a number is                                             in blocks of
=======  ======================================================  =================================
nvfp4    ``units * scale * factor``, scale in float8 e4m3         16, one factor for the weight
mxfp4    ``units * 2 ** (scale - 127)``                           32 (OCP Microscaling Formats v1.0)
=======  ======================================================  =================================

They are torchao's NVFP4Tensor with a scale for the whole weight, and its MXTensor as ``ScaleCalculationMode.EVEN``
makes it: of its modes the one that is nearest to normally distributed weights (11.2 % off; floor 11.4, rceil 11.9).
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional


class NVFP4Codes(NamedTuple):
    """``codes * scale * factor``, 4-bit floating point in blocks of 16: the inner tensors of torchao's NVFP4Tensor, a
    prototype there."""

    codes: UInt8[Tensor, "*stack out half_in"]  # two numbers a byte, the first one below
    scale: Float[Tensor, "*stack rows blocks"]  # float8_e4m3fn; (out, blocks), or in tiles as tensor cores read them
    factor: Float[Tensor, "..."]  # float32, (*stack); (*stack, out, 1) where rows lie on several processes


class MXFP4Codes(NamedTuple):
    """``codes * 2 ** (scale - 127)``, 4-bit floating point in blocks of 32: the inner tensors of torchao's MXTensor, a
    prototype there."""

    codes: UInt8[Tensor, "*stack out half_in"]  # two numbers a byte, the first one below
    scale: UInt8[Tensor, "*stack out blocks"]  # the bits of torchao's float8_e8m0fnu, which Inductor does not know


BLOCKS = {"nvfp4": 16, "mxfp4": 32}
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = (*_MAGNITUDES, *(-value for value in _MAGNITUDES))
_MOST, _MOST_SCALE, _LEAST_SCALE = 6, 448, 2.0**-6  # of e2m1, and of e4m3 the normal numbers
_LEAST_FACTOR = 2.0**-100


def empty_codes(kind: str, name: str, weight: Tensor) -> NVFP4Codes | MXFP4Codes:
    """Codes without values. Raises ValueError if the blocks do not divide the rows of the weight called `name`."""
    (out_features, in_features), block = weight.shape, BLOCKS[kind]
    if in_features % block:
        rule = f"have a multiple of {block} as `in` to be held in blocks of {block} in {kind}, a prototype in torchao"
        raise ValueError(f"weight {name!r} must {rule}, got {tuple(weight.shape)}")
    codes = weight.new_empty((out_features, in_features // 2), dtype=torch.uint8)
    dtype = torch.float8_e4m3fn if kind == "nvfp4" else torch.uint8
    scale = weight.new_empty((out_features, in_features // block), dtype=dtype)
    return (
        NVFP4Codes(codes, scale, scale.new_empty((), dtype=torch.float32))
        if kind == "nvfp4"
        else MXFP4Codes(codes, scale)
    )


def encode_nvfp4(weight: Tensor, like: NVFP4Codes) -> NVFP4Codes:
    blocks = weight.reshape(len(weight), -1, BLOCKS["nvfp4"])  # (out, blocks, 16)
    largest = blocks.abs().amax(-1)
    factor = (largest.amax(-1, keepdim=True) if like.factor.ndim else largest.amax()) / (_MOST_SCALE * _MOST)
    # Of the smallest weights the factor's inverse would be infinite; a power of two changes no bit of the quotients.
    lift = torch.where(factor < _LEAST_FACTOR, 2.0**64, 1.0).to(torch.float32)
    lifted = (factor * lift).clamp_(min=_LEAST_FACTOR)
    scale = (largest * lift / _MOST / lifted).clamp_(_LEAST_SCALE, _MOST_SCALE).to(torch.float8_e4m3fn)
    inverse = (1.0 / lifted) / scale.to(torch.float32)
    codes = _pack((blocks * lift[..., None]).mul_(inverse[..., None]))
    is_swizzled = like.scale.shape != scale.shape
    return NVFP4Codes(codes.reshape(like.codes.shape), swizzled(scale) if is_swizzled else scale, factor)


def encode_mxfp4(weight: Tensor, like: MXFP4Codes) -> MXFP4Codes:
    blocks = weight.reshape(*like.scale.shape, -1)  # (out, blocks, 32)
    bits = blocks.abs().amax(-1).view(torch.int32)
    # The exponent of the largest number once that is rounded to one bit behind the point, less the 2 of the format's 6.
    scale = (((bits + 2**21) >> 23) - 2).clamp_(min=0)
    units = blocks / (scale << 23).view(torch.float32).clamp_(min=torch.finfo(torch.float32).tiny)[..., None]
    return MXFP4Codes(_pack(units).reshape(like.codes.shape), scale.to(torch.uint8))


def decode(codes: NVFP4Codes | MXFP4Codes) -> Tensor:
    """In float32, (*stack, out, in)."""
    *stack, out_features, half = codes.codes.shape
    if isinstance(codes, NVFP4Codes):
        scale, blocks = codes.scale, 2 * half // BLOCKS["nvfp4"]
        scale = scale if scale.shape[-1] == blocks else plain(scale, out_features, blocks)
        factor = codes.factor if has_factors_by_row(codes) else codes.factor[..., None, None]
        factors = factor * scale.to(torch.float32)
    else:
        factors = torch.pow(2.0, codes.scale.to(torch.float32) - 127)
    numbers = torch.stack([codes.codes & 0b1111, codes.codes >> 4], dim=-1)
    units = torch.tensor(_VALUES, dtype=torch.float32, device=numbers.device)[numbers.int()]
    values = units.reshape(*factors.shape, -1).mul_(factors[..., None])
    return values.reshape(*stack, out_features, 2 * half)


def has_factors_by_row(codes: NVFP4Codes) -> bool:
    return codes.factor.ndim == codes.codes.ndim


def with_factors_by_row(codes: NVFP4Codes) -> NVFP4Codes:
    """The same numbers, whose rows are encoded again apart from each other. Scales are no longer in tiles."""
    if has_factors_by_row(codes):
        return codes
    *_, out_features, half = codes.codes.shape
    scale, blocks = codes.scale, 2 * half // BLOCKS["nvfp4"]
    scale = scale if scale.shape[-1] == blocks else plain(scale, out_features, blocks)
    factor = codes.factor[..., None, None].expand(*codes.codes.shape[:-1], 1).clone()
    return NVFP4Codes(codes.codes, scale, factor)


def with_one_factor(codes: NVFP4Codes) -> NVFP4Codes:
    """The way back, as long as the factors of all rows are the same."""
    first = codes.factor[..., :1, :]
    is_one = has_factors_by_row(codes) and bool((codes.factor == first).all())
    return codes._replace(factor=first[..., 0, 0].clone()) if is_one else codes


def _pack(units: Tensor) -> Tensor:
    """Two numbers a byte, the first one below; of equally near ones the even code, beyond 6 the largest."""
    numbers = torch.bucketize(units.abs(), _limits().to(units.device)).to(torch.uint8)
    numbers |= torch.signbit(units).to(torch.uint8) << 3
    return numbers[..., ::2] | (numbers[..., 1::2] << 4)


@lru_cache(maxsize=1)
def _limits() -> Tensor:
    """Up to which number each magnitude but the last is taken: the middle, or just before it where the next is even."""
    values = torch.tensor(_MAGNITUDES, dtype=torch.float32)
    middle = (values[:-1] + values[1:]) / 2
    return torch.where(torch.arange(len(middle)) % 2 == 0, middle, torch.nextafter(middle, torch.tensor(0.0)))


# Tensor cores read scales in tiles of 128 rows and 4 blocks, and torchao's NVFP4WeightOnlyConfig lays them out so.


def swizzled(scale: Tensor) -> Tensor:
    """(out, blocks) in tiles, padded with zeros: (32 * row tiles, 16 * column tiles)."""
    rows, columns = scale.shape
    bits = functional.pad(scale.view(torch.uint8), (0, -columns % 4, 0, -rows % 128))
    tiles = rearrange(bits, "(R q p) (C c) -> (R C p q c)", q=4, p=32, c=4)
    return tiles.reshape(bits.shape[0] // 4, bits.shape[1] * 4).view(scale.dtype)


def plain(scale: Tensor, rows: int, columns: int) -> Tensor:
    """The way back, of a stack too."""
    tiles = scale.view(torch.uint8).flatten(-2)
    high, wide = -(-rows // 128), -(-columns // 4)
    bits = rearrange(tiles, "... (R C p q c) -> ... (R q p) (C c)", R=high, C=wide, p=32, q=4, c=4)
    return bits[..., :rows, :columns].contiguous().view(scale.dtype)
