"""NF4: 4-bit quantiles of a normal distribution (arXiv:2305.14314), in torchao's layout."""

from functools import lru_cache
from math import gcd
from typing import NamedTuple

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor


class NF4Codes(NamedTuple):
    """NF4 codes (arXiv:2305.14314): the inner tensors of torchao's NF4Tensor.

    Blocks of 64 entries, row by row, share a scale. The scales are 8-bit integers, and groups of blocks share a factor.
    """

    codes: UInt8[Tensor, "*stack out half_in"]  # two 4-bit codes in each byte, the first in the high bits
    scales: Int8[Tensor, "*stack blocks"]
    factor: Float[Tensor, "*stack scale_blocks"]  # a block's scale is ``scales / factor + mean``
    mean: Float[Tensor, "*stack"]


_BLOCK, _SCALE_BLOCK = 64, 256
# Quantiles of a normal distribution, rounded as in torchao.
_BELOW = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0)
VALUES = (*_BELOW, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0)


def empty_codes(name: str, weight: Tensor) -> NF4Codes:
    """Return uninitialized codes for one weight.

    The blocks have 64 entries. The largest divisor of the number of blocks that also divides 256 is the number of
    blocks that share a factor.

    Raises:
        ValueError: If blocks of 64 do not divide the weight, or `in` is odd.
    """
    out_features, in_features = weight.shape
    if weight.numel() % _BLOCK or in_features % 2:
        raise ValueError(
            f"weight {name!r} of shape {tuple(weight.shape)} does not fit nf4, which needs a multiple of {_BLOCK}"
            " entries and an even `in`; use another format for it"
        )
    blocks = weight.numel() // _BLOCK
    dtype = torch.promote_types(weight.dtype, torch.bfloat16) if weight.dtype != torch.float64 else torch.float32
    return NF4Codes(
        codes=weight.new_empty((out_features, in_features // 2), dtype=torch.uint8),
        scales=weight.new_empty(blocks, dtype=torch.int8),
        factor=weight.new_empty(blocks // gcd(blocks, _SCALE_BLOCK), dtype=dtype),
        mean=weight.new_empty((), dtype=dtype),
    )


def encode(weight: Tensor, like: NF4Codes, *, again: bool = False) -> NF4Codes:
    """Encode a weight (out, in) in float32 in the layout of `like`.

    A weight that was decoded from codes and is encoded `again` keeps their mean. The mean is only the center of the
    scales, and a new one would make the codes of every row depend on all rows.
    """
    blocks = weight.reshape(like.scales.shape[-1], -1)
    largest = blocks.abs().amax(-1)
    mean = like.mean.to(largest.dtype) if again else largest.mean()
    differences = (largest - mean).reshape(like.factor.shape[-1], -1)
    factor = 256 / (2 * differences.abs().amax(-1))
    # The factor is infinite where all blocks that share it are equal. Their differences are then NaN, and become zero.
    scales = (differences * factor[:, None]).nan_to_num_(0).round_().clamp_(-128, 127)
    units = blocks / torch.where(largest > 0, largest, 1)[:, None]
    pairs = torch.bucketize(units, _limits().to(units.device)).to(torch.uint8).reshape(-1, 2)
    codes = (pairs[:, 0] << 4) | pairs[:, 1]
    dtype = like.mean.dtype
    return NF4Codes(codes.reshape(like.codes.shape), scales.flatten().to(torch.int8), factor.to(dtype), mean.to(dtype))


@lru_cache(maxsize=1)
def _limits() -> Tensor:
    """Return the largest float32 nearest to each value, except for the last.

    A tie goes to the smaller value. The limit is near the middle of two values, where their rounded distances are
    equal.
    """
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
    """Decode to a dense weight (*stack, out, in) in the dtype of the mean."""
    *stack, out_features, half = codes.codes.shape
    dtype, (blocks, factors) = codes.mean.dtype, (codes.scales.shape[-1], codes.factor.shape[-1])
    differences = codes.scales.reshape(*stack, factors, -1) / codes.factor[..., None]
    scales = differences.reshape(*stack, blocks).to(dtype) + codes.mean[..., None]
    indices = torch.stack([codes.codes >> 4, codes.codes & 0b1111], dim=-1)
    units = torch.tensor(VALUES, dtype=dtype, device=codes.codes.device)[indices.int()]
    values = units.reshape(*stack, blocks, -1) * scales[..., None]
    return values.reshape(*stack, out_features, 2 * half)
