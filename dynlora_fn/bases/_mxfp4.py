"""MXFP4: e2m1 in blocks of 32, with scales that are powers of two (see `_e2m1`)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor

from dynlora_fn._core._types import Sharding
from dynlora_fn.bases._e2m1 import empty_packed, pack, prototypes, unpack, unpacked_shape
from dynlora_fn.bases._format import RowMap

BLOCK = 32


class MXFP4Codes(NamedTuple):
    """MXFP4 codes of a weight ``codes * 2 ** (scale - 127)``, in blocks of 32.

    These are the inner tensors of torchao's prototype MXTensor.
    """

    codes: UInt8[Tensor, "*stack out half_in"]  # two 4-bit codes in each byte, the first in the low bits
    scale: UInt8[Tensor, "*stack out blocks"]  # the bits of float8_e8m0fnu, which Inductor does not support

    @property
    def kind(self) -> str:
        return "mxfp4"

    @property
    def shape(self) -> torch.Size:
        return unpacked_shape(self.codes)

    @property
    def dtypes(self) -> Sequence[Sequence[torch.dtype]]:
        return (torch.uint8,), (torch.uint8,)

    @property
    def sum_dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def half_step(self) -> float:
        return 0.2

    @property
    def is_tied(self) -> bool:
        return False

    @property
    def keeps_half_precision(self) -> bool:
        return True

    @classmethod
    def dtype_of(cls, config: Any) -> torch.dtype | None:
        return None

    @classmethod
    def empty(cls, name: str, weight: Tensor, dtype: torch.dtype | None = None) -> "MXFP4Codes":
        codes = empty_packed("mxfp4", name, weight, BLOCK)
        return cls(codes, weight.new_empty((weight.shape[0], weight.shape[1] // BLOCK), dtype=torch.uint8))

    def encode(self, weight: Tensor, *, again: bool = False) -> "MXFP4Codes":
        blocks = weight.to(torch.float32).reshape(*self.scale.shape, -1)  # (out, blocks, 32)
        bits = blocks.abs().amax(-1).view(torch.int32)
        # The exponent of the largest value, rounded to one fractional bit, minus 2: the exponent of 6 in e2m1.
        scale = (((bits + 2**21) >> 23) - 2).clamp_(min=0)
        units = blocks / (scale << 23).view(torch.float32).clamp_(min=torch.finfo(torch.float32).tiny)[..., None]
        return MXFP4Codes(pack(units).reshape(self.codes.shape), scale.to(torch.uint8))

    def decode(self, dtype: torch.dtype) -> Tensor:
        return unpack(self.codes, torch.pow(2.0, self.scale.to(torch.float32) - 127)).to(dtype)

    def decode_into(self, target: Tensor) -> None:
        target.copy_(self.decode(target.dtype))

    def scaled(self, factor: float | Tensor) -> None:
        return None  # the scales are powers of two

    def map_rows(self, change: RowMap, sharding: Sharding) -> "MXFP4Codes":
        return MXFP4Codes(change(self.codes, sharding), change(self.scale, sharding))

    def by_rows(self, name: str, sharding: Sharding) -> "MXFP4Codes":
        return self

    def of_all_rows(self) -> "MXFP4Codes":
        return self

    @classmethod
    def from_torchao(cls, tensor: Any) -> "MXFP4Codes | None":
        if type(tensor).__name__ != "MXTensor" or tensor.elem_dtype != torch.float4_e2m1fn_x2:
            return None
        is_swizzled = tensor.scale.shape[0] != tensor.qdata.shape[0]
        return None if is_swizzled else cls(tensor.qdata, tensor.scale.view(torch.uint8))

    def to_torchao(self, like: Tensor) -> Tensor:
        _, mx_tensor, preferences = prototypes()
        scale, packed = self.scale.view(torch.float8_e8m0fnu), torch.float4_e2m1fn_x2
        block = self.shape[-1] // self.scale.shape[-1]
        tensor: Tensor = mx_tensor(self.codes, scale, packed, block, like.dtype, preferences.EMULATED, None, False)
        return tensor
