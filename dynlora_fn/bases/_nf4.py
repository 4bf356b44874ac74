"""NF4: 4-bit quantiles of a normal distribution (arXiv:2305.14314), as torchao lays them out."""

from functools import lru_cache
from math import gcd
from typing import NamedTuple

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor


class NF4Codes(NamedTuple):
    """4-bit quantiles of a normal distribution, scaled by blocks; the scales in turn are 8-bit numbers, scaled by
    blocks of blocks (arXiv:2305.14314): the inner tensors of torchao's NF4Tensor, which cuts the weight into blocks
    row after row."""

    codes: UInt8[Tensor, "*stack out half_in"]  # two numbers a byte, the first one above
    scales: Int8[Tensor, "*stack blocks"]
    factor: Float[Tensor, "*stack scale_blocks"]  # a block's scale is ``scales / factor + mean``
    mean: Float[Tensor, "*stack"]


_BLOCK, _SCALE_BLOCK = 64, 256
# Quantiles of a normal distribution, as torchao rounds them.
_BELOW = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0)
VALUES = (*_BELOW, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0)


def empty_codes(name: str, weight: Tensor) -> NF4Codes:
    """Blocks of 64 numbers, and the most blocks up to 256 that divide their number share a factor."""
    out_features, in_features = weight.shape
    if weight.numel() % _BLOCK or in_features % 2:
        rule = f"have a multiple of {_BLOCK} numbers and an even `in` to be held in blocks of {_BLOCK} in nf4"
        raise ValueError(f"weight {name!r} must {rule}, got {tuple(weight.shape)}")
    blocks = weight.numel() // _BLOCK
    dtype = torch.promote_types(weight.dtype, torch.bfloat16) if weight.dtype != torch.float64 else torch.float32
    return NF4Codes(
        codes=weight.new_empty((out_features, in_features // 2), dtype=torch.uint8),
        scales=weight.new_empty(blocks, dtype=torch.int8),
        factor=weight.new_empty(blocks // gcd(blocks, _SCALE_BLOCK), dtype=dtype),
        mean=weight.new_empty((), dtype=dtype),
    )


def encode(weight: Tensor, like: NF4Codes, *, again: bool = False) -> NF4Codes:
    """What was codes before keeps its mean, which is but the middle that scales are counted from: a new one would tie
    all rows together."""
    blocks = weight.reshape(like.scales.shape[-1], -1)
    largest = blocks.abs().amax(-1)
    mean = like.mean.to(largest.dtype) if again else largest.mean()
    differences = (largest - mean).reshape(like.factor.shape[-1], -1)
    factor = 256 / (2 * differences.abs().amax(-1))
    # Where all blocks of a factor are alike it is infinite, and their scales' differences are no numbers but zero.
    scales = (differences * factor[:, None]).nan_to_num_(0).round_().clamp_(-128, 127)
    units = blocks / torch.where(largest > 0, largest, 1)[:, None]
    numbers = torch.bucketize(units, _limits().to(units.device)).to(torch.uint8).reshape(-1, 2)
    codes = (numbers[:, 0] << 4) | numbers[:, 1]
    dtype = like.mean.dtype
    return NF4Codes(codes.reshape(like.codes.shape), scales.flatten().to(torch.int8), factor.to(dtype), mean.to(dtype))


@lru_cache(maxsize=1)
def _limits() -> Tensor:
    """Up to which number in float32 each of the values but the last is the nearest, of equally near ones the first:
    the middle between two, where the distances are equal once they are rounded."""
    values = torch.tensor(VALUES, dtype=torch.float32)
    below, above = values[:-1], values[1:]
    limits = (below + above) / 2
    infinity = torch.tensor(torch.inf)
    for _ in range(4):
        further = torch.nextafter(limits, infinity)
        limits = torch.where((further - below).abs() <= (further - above).abs(), further, limits)
    for _ in range(8):
        is_too_far = (limits - below).abs() > (limits - above).abs()
        limits = torch.where(is_too_far, torch.nextafter(limits, -infinity), limits)
    return limits


def decode(codes: NF4Codes) -> Tensor:
    *stack, out_features, half = codes.codes.shape
    dtype, (blocks, factors) = codes.mean.dtype, (codes.scales.shape[-1], codes.factor.shape[-1])
    differences = codes.scales.reshape(*stack, factors, -1) / codes.factor[..., None]
    scales = differences.reshape(*stack, blocks).to(dtype) + codes.mean[..., None]
    numbers = torch.stack([codes.codes >> 4, codes.codes & 0b1111], dim=-1)
    units = torch.tensor(VALUES, dtype=dtype, device=codes.codes.device)[numbers.int()]
    values = units.reshape(*stack, blocks, -1) * scales[..., None]
    return values.reshape(*stack, out_features, 2 * half)
