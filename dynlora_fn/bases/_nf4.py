"""NF4: 4-bit quantiles of a normal distribution, in torchao's layout.

The format is from arXiv:2305.14314.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from math import gcd
from struct import pack, unpack
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from dynlora_fn._core._types import Sharding
from dynlora_fn.bases import _torchao
from dynlora_fn.bases._format import RowMap
from dynlora_fn.bases._refusals import refuse

_BLOCK, _SCALE_BLOCK = 64, 256
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Quantiles of a normal distribution, rounded as in torchao.
_BELOW = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0)
VALUES = (*_BELOW, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0)


class NF4Codes(NamedTuple):
    """NF4 codes (arXiv:2305.14314): the inner tensors of torchao's NF4Tensor.

    Each block of 64 consecutive entries, in row-major order, has a scale. Scales are 8-bit integers, and groups of
    blocks share a factor that converts them to floats.
    """

    codes: UInt8[Tensor, "*stack out half_in"]  # two 4-bit codes in each byte, the first in the high bits
    scales: Int8[Tensor, "*stack blocks"]
    factor: Float[Tensor, "*stack scale_blocks"]  # the scale of a block is ``scales / factor + mean``
    mean: Float[Tensor, "*stack"]

    @property
    def kind(self) -> str:
        return "nf4"

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.codes.shape[:-1], 2 * self.codes.shape[-1]))

    @property
    def dtypes(self) -> Sequence[Sequence[torch.dtype]]:
        return (torch.uint8,), (torch.int8,), _SCALE_DTYPES, _SCALE_DTYPES

    @property
    def sum_dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def half_step(self) -> float:
        return 0.17

    @property
    def is_tied(self) -> bool:
        return True

    @property
    def keeps_half_precision(self) -> bool:
        return False  # its scales are in float32, and torchao's tensor has their dtype

    @classmethod
    def dtype_of(cls, config: Any) -> torch.dtype | None:
        return None

    @classmethod
    def empty(cls, name: str, weight: Tensor, dtype: torch.dtype | None = None) -> "NF4Codes":
        """Return uninitialized codes for one weight.

        Blocks have 64 entries. ``gcd(blocks, 256)`` blocks share a factor.

        Raises:
            ValueError: If the number of entries is not a multiple of 64, or `in` is odd.
        """
        out_features, in_features = weight.shape
        if weight.numel() % _BLOCK or in_features % 2:
            refuse("nf4, shape", name=name, shape=tuple(weight.shape), block=_BLOCK)
        blocks = weight.numel() // _BLOCK
        is_double = weight.dtype == torch.float64
        scale_dtype = torch.float32 if is_double else torch.promote_types(weight.dtype, torch.bfloat16)
        return cls(
            codes=weight.new_empty((out_features, in_features // 2), dtype=torch.uint8),
            scales=weight.new_empty(blocks, dtype=torch.int8),
            factor=weight.new_empty(blocks // gcd(blocks, _SCALE_BLOCK), dtype=scale_dtype),
            mean=weight.new_empty((), dtype=scale_dtype),
        )

    def encode(self, weight: Tensor, *, again: bool = False) -> "NF4Codes":
        """Encode a weight in the layout of these codes, and keep their mean if `again`.

        The mean only centers the scales. A new mean would make the codes of every row depend on all rows.
        """
        weight = weight.to(torch.float32)
        blocks = weight.reshape(self.scales.shape[-1], -1)
        largest = blocks.abs().amax(-1)
        mean = self.mean.to(largest.dtype) if again else largest.mean()
        differences = (largest - mean).reshape(self.factor.shape[-1], -1)
        factor = 256 / (2 * differences.abs().amax(-1))
        # The factor is infinite if all blocks that share it have one scale. The products are then NaN, and become 0.
        scales = (differences * factor[:, None]).nan_to_num_(0).round_().clamp_(-128, 127)
        units = blocks / torch.where(largest > 0, largest, 1)[:, None]
        limits = torch.tensor(_limits(), dtype=torch.float32, device=units.device)
        pairs = torch.bucketize(units, limits).to(torch.uint8).reshape(-1, 2)
        codes, dtype = (pairs[:, 0] << 4) | pairs[:, 1], self.mean.dtype
        scales = scales.flatten().to(torch.int8)
        return NF4Codes(codes.reshape(self.codes.shape), scales, factor.to(dtype), mean.to(dtype))

    def decode(self, dtype: torch.dtype) -> Tensor:
        *stack, out_features, half = self.codes.shape
        scale_dtype, blocks, factors = self.mean.dtype, self.scales.shape[-1], self.factor.shape[-1]
        differences = self.scales.reshape(*stack, factors, -1) / self.factor[..., None]
        scales = differences.reshape(*stack, blocks).to(scale_dtype) + self.mean[..., None]
        indices = torch.stack([self.codes >> 4, self.codes & 0b1111], dim=-1)
        units = torch.tensor(VALUES, dtype=scale_dtype, device=self.codes.device)[indices.int()]
        values = units.reshape(*stack, blocks, -1) * scales[..., None]
        return values.reshape(*stack, out_features, 2 * half).to(dtype)

    def decode_into(self, target: Tensor) -> None:
        target.copy_(self.decode(target.dtype))

    def scaled(self, factor: float | Tensor) -> "NF4Codes | None":
        if self.mean.dtype != torch.float32:  # bfloat16 would round the scales
            return None
        mean = (self.mean * factor).to(torch.float32)
        return self._replace(factor=(self.factor / factor).to(torch.float32), mean=mean)

    def map_rows(self, change: RowMap, sharding: Sharding) -> "NF4Codes":
        """Apply `change` to every tensor that has the rows of the weight.

        Scales and factors have one axis in row order. Each process has equally many of them, so they are sharded like a
        matrix with one column.
        """
        shards = self.codes.shape[-2] // sharding.rows_per_process  # all shards, or 1 if the codes are one shard

        def change_blocks(blocks: Tensor) -> Tensor:
            total = blocks.shape[-1] // shards * sharding.world_size
            return change(blocks[..., None], replace(sharding, rows=total))[..., 0]

        codes = change(self.codes, sharding)
        return NF4Codes(codes, change_blocks(self.scales), change_blocks(self.factor), self.mean)

    def by_rows(self, name: str, sharding: Sharding) -> "NF4Codes":
        rows, columns = self.shape[-2:]
        entries = rows * columns // self.factor.shape[-1]
        if rows % sharding.world_size or sharding.rows_per_process * columns % entries:
            refuse("shard, nf4", name=name, shape=(rows, columns), processes=sharding.world_size, entries=entries)
        return self

    def of_all_rows(self) -> "NF4Codes":
        return self

    @classmethod
    def from_torchao(cls, tensor: Any) -> "NF4Codes | None":
        if not isinstance(tensor, _torchao.NF4Tensor) or tensor.shape[1] % 2:
            return None
        codes = tensor.quantized_data.reshape(tensor.shape[0], -1)
        return cls(codes, tensor.quantized_scalers, tensor.quantization_factor, tensor.scaler_mean)

    def to_torchao(self, like: Tensor) -> Tensor:
        blocks = len(self.scales)
        # torchao computes the metadata of its tensor for a weight of this shape.
        sizes = self.shape.numel() // blocks, blocks // len(self.factor)
        _, context = _torchao.to_nf4(self.mean.new_zeros(self.shape), *sizes).__tensor_flatten__()
        inner = {
            "quantized_data": self.codes.flatten(),
            "scaler_mean": self.mean,
            "quantization_factor": self.factor,
            "quantized_scalers": self.scales,
            "nf4": torch.tensor(VALUES, dtype=self.mean.dtype, device=self.mean.device),
        }
        tensor: Tensor = _torchao.NF4Tensor.__tensor_unflatten__(inner, context, None, None)
        return tensor


@lru_cache(maxsize=1)
def _limits() -> list[float]:
    """Return the largest float32 that rounds to each value but the last.

    A tie goes to the smaller value. The limit can differ from the midpoint of two values by some floats, because the
    distances to both are rounded before they are compared. It is computed in Python, because a cached tensor could
    belong to another device or to a trace.
    """
    values = [_rounded(value) for value in VALUES]
    return [_limit(below, above) for below, above in pairwise(values)]


def _limit(below: float, above: float) -> float:
    """Return the largest float32 that is not further from `below` than from `above`.

    Distances are rounded to float32.
    """

    def is_nearest_to_below(value: float) -> bool:
        return _rounded(value - below) <= _rounded(above - value)

    limit = _rounded((below + above) / 2)
    while is_nearest_to_below(_next(limit, 1)):
        limit = _next(limit, 1)
    while not is_nearest_to_below(limit):
        limit = _next(limit, -1)
    return limit


def _rounded(value: float) -> float:
    """Round a number to float32."""
    rounded: float = unpack("f", pack("f", value))[0]
    return rounded


def _next(value: float, direction: int) -> float:
    """Return the float32 next to one that is not zero, up or down."""
    (bits,) = unpack("i", pack("f", value))
    following: float = unpack("f", pack("i", bits + (direction if value > 0 else -direction)))[0]
    return following
