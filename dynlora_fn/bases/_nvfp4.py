"""NVFP4: e2m1 in blocks of 16, with float8 scales and one float32 factor.

See `_e2m1`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from dynlora_fn._core._types import Sharding
from dynlora_fn.bases._e2m1 import empty_packed, pack, prototypes, unpack, unpacked_shape
from dynlora_fn.bases._format import RowMap
from dynlora_fn.bases._refusals import refuse

BLOCK = 16
_LARGEST, _LARGEST_SCALE, _LEAST_SCALE = 6, 448, 2.0**-6  # largest value of e2m1; normal range of e4m3
_LEAST_FACTOR = 2.0**-100


class NVFP4Codes(NamedTuple):
    """NVFP4 codes of a weight ``codes * scale * factor``, in blocks of 16.

    These are the inner tensors of torchao's prototype NVFP4Tensor.
    """

    codes: UInt8[Tensor, "*stack out half_in"]  # two 4-bit codes in each byte, the first in the low bits
    scale: Float[Tensor, "*stack rows blocks"]  # float8_e4m3fn; (*stack, out, blocks), or in tiles (see `swizzled`)
    factor: Float[Tensor, "..."]  # float32, (*stack); (*stack, out, 1) once the base was sharded

    @property
    def kind(self) -> str:
        return "nvfp4"

    @property
    def shape(self) -> torch.Size:
        return unpacked_shape(self.codes)

    @property
    def dtypes(self) -> Sequence[Sequence[torch.dtype]]:
        return (torch.uint8,), (torch.float8_e4m3fn,), (torch.float32,)

    @property
    def sum_dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def half_step(self) -> float:
        return 0.2

    @property
    def is_tied(self) -> bool:
        return not self.has_factors_by_row

    @property
    def keeps_half_precision(self) -> bool:
        return True

    @property
    def has_factors_by_row(self) -> bool:
        """Whether there is a factor for each row instead of one for the weight."""
        return self.factor.ndim == self.codes.ndim

    @property
    def is_in_tiles(self) -> bool:
        """Whether the scales are in the tiles of tensor cores."""
        return self.scale.shape[-1] * BLOCK != 2 * self.codes.shape[-1]

    @property
    def plain_scale(self) -> Tensor:
        """The scales as (*stack, out, blocks), without tiles."""
        out_features, half = self.codes.shape[-2:]
        return plain(self.scale, out_features, 2 * half // BLOCK) if self.is_in_tiles else self.scale

    @classmethod
    def dtype_of(cls, config: Any) -> torch.dtype | None:
        # Compared by name, because importing the type would import a prototype of torchao.
        is_nvfp4 = type(config).__name__ == "NVFP4WeightOnlyConfig"
        return torch.uint8 if is_nvfp4 and getattr(config, "use_dynamic_per_tensor_scale", False) else None

    @classmethod
    def empty(cls, name: str, weight: Tensor, dtype: torch.dtype | None = None) -> "NVFP4Codes":
        codes = empty_packed("nvfp4", name, weight, BLOCK)
        scale = weight.new_empty((weight.shape[0], weight.shape[1] // BLOCK), dtype=torch.float8_e4m3fn)
        return cls(codes, scale, weight.new_empty((), dtype=torch.float32))

    def encode(self, weight: Tensor, *, again: bool = False) -> "NVFP4Codes":
        """Encode a weight in the layout of these codes.

        The result has tiles, or a factor for each row, if these codes do.
        """
        blocks = weight.to(torch.float32).reshape(len(weight), -1, BLOCK)  # (out, blocks, 16)
        largest = blocks.abs().amax(-1)
        factor = largest.amax(-1, keepdim=True) if self.factor.ndim else largest.amax()
        factor = factor / (_LARGEST_SCALE * _LARGEST)
        # The inverse of a very small factor would be infinite. Scaling by a power of two keeps the bits of a quotient.
        lift = torch.where(factor < _LEAST_FACTOR, 2.0**64, 1.0).to(torch.float32)
        lifted = (factor * lift).clamp_(min=_LEAST_FACTOR)
        scale = (largest * lift / _LARGEST / lifted).clamp_(_LEAST_SCALE, _LARGEST_SCALE).to(torch.float8_e4m3fn)
        inverse = (1.0 / lifted) / scale.to(torch.float32)
        codes = pack((blocks * lift[..., None]).mul_(inverse[..., None])).reshape(self.codes.shape)
        return NVFP4Codes(codes, swizzled(scale) if self.is_in_tiles else scale, factor)

    def decode(self, dtype: torch.dtype) -> Tensor:
        factor = self.factor if self.has_factors_by_row else self.factor[..., None, None]
        return unpack(self.codes, factor * self.plain_scale.to(torch.float32)).to(dtype)

    def decode_into(self, target: Tensor) -> None:
        target.copy_(self.decode(target.dtype))

    def scaled(self, factor: float | Tensor) -> "NVFP4Codes":
        return self._replace(factor=(self.factor * factor).to(torch.float32))

    def map_rows(self, change: RowMap, sharding: Sharding) -> "NVFP4Codes":
        return NVFP4Codes(change(self.codes, sharding), change(self.scale, sharding), change(self.factor, sharding))

    def by_rows(self, name: str, sharding: Sharding) -> "NVFP4Codes":
        """Give each row a factor, so that later folds encode rows independently.

        The decoded values do not change. The result has no tiles.
        """
        if self.has_factors_by_row:
            return self
        factor = self.factor[..., None, None].expand(*self.codes.shape[:-1], 1).clone()
        return NVFP4Codes(self.codes, self.plain_scale, factor)

    def of_all_rows(self) -> "NVFP4Codes":
        """Return codes with one factor if all rows have the same factor."""
        if not self.has_factors_by_row or bool((self.factor != self.factor[..., :1, :]).any()):
            return self
        return self._replace(factor=self.factor[..., 0, 0].clone())

    @classmethod
    def from_torchao(cls, tensor: Any) -> "NVFP4Codes | None":
        if type(tensor).__name__ != "NVFP4Tensor" or tensor.per_tensor_scale is None or tensor.per_tensor_scale.ndim:
            return None
        return cls(tensor.qdata, tensor.scale, tensor.per_tensor_scale)

    def to_torchao(self, like: Tensor) -> Tensor:
        nvfp4_tensor, *_ = prototypes()
        if self.has_factors_by_row:
            refuse("torchao, nvfp4 by row", shape=tuple(self.factor.shape))
        settings = {"per_tensor_scale": self.factor, "is_swizzled_scales": self.is_in_tiles}
        tensor: Tensor = nvfp4_tensor(self.codes, self.scale, BLOCK, like.dtype, **settings)
        return tensor


# Tensor cores read scales in tiles of 128 rows and 4 columns. torchao's NVFP4WeightOnlyConfig uses this layout.


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
