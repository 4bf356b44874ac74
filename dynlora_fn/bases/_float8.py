"""float8 with one scale for each row, in torchao's layout."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dynlora_fn._core._types import Sharding
from dynlora_fn.bases import _torchao
from dynlora_fn.bases._format import RowMap
from dynlora_fn.bases._rowwise import decode_rows, decode_rows_into, empty_scale, is_by_row

_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


class Float8Codes(NamedTuple):
    """float8 codes of a weight ``codes * scale``, with one scale for each row.

    These are the inner tensors of torchao's Float8Tensor.
    """

    codes: Float[Tensor, "*stack out in"]  # float8_e4m3fn or float8_e5m2
    scale: Float[Tensor, "*stack out 1"]  # float32

    @property
    def kind(self) -> str:
        return "float8"

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def dtypes(self) -> Sequence[Sequence[torch.dtype]]:
        return _DTYPES, (torch.float32,)

    @property
    def sum_dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def half_step(self) -> float:
        return 2**-4 if self.codes.dtype == torch.float8_e4m3fn else 2**-3

    @property
    def is_tied(self) -> bool:
        return False

    @property
    def keeps_half_precision(self) -> bool:
        return True

    @classmethod
    def dtype_of(cls, config: Any) -> torch.dtype | None:
        is_float8 = isinstance(config, _torchao.Float8WeightOnlyConfig) and config.granularity == _torchao.PerRow()
        return config.weight_dtype if is_float8 else None

    @classmethod
    def empty(cls, name: str, weight: Tensor, dtype: torch.dtype | None = None) -> "Float8Codes":
        return cls(weight.new_empty(weight.shape, dtype=dtype or torch.float8_e4m3fn), empty_scale(weight))

    def encode(self, weight: Tensor, *, again: bool = False) -> "Float8Codes":
        most = torch.finfo(self.codes.dtype).max
        scale = (weight.abs().amax(-1, keepdim=True) / most).to(torch.float32)
        codes = (weight / torch.where(scale > 0, scale, 1)).clamp_(-most, most)
        return Float8Codes(codes.to(self.codes.dtype), scale)

    def decode(self, dtype: torch.dtype) -> Tensor:
        return decode_rows(self.codes, self.scale, dtype)

    def decode_into(self, target: Tensor) -> None:
        decode_rows_into(target, self.codes, self.scale)

    def scaled(self, factor: float | Tensor) -> "Float8Codes":
        return self._replace(scale=(self.scale * factor).to(self.scale.dtype))

    def map_rows(self, change: RowMap, sharding: Sharding) -> "Float8Codes":
        return Float8Codes(change(self.codes, sharding), change(self.scale, sharding))

    def by_rows(self, name: str, sharding: Sharding) -> "Float8Codes":
        return self

    def of_all_rows(self) -> "Float8Codes":
        return self

    @classmethod
    def from_torchao(cls, tensor: Any) -> "Float8Codes | None":
        is_float8 = isinstance(tensor, _torchao.Float8Tensor) and is_by_row(tensor, tensor.scale)
        return cls(tensor.qdata, tensor.scale) if is_float8 else None

    def to_torchao(self, like: Tensor) -> Tensor:
        block = [1, self.codes.shape[1]]
        tensor: Tensor = _torchao.Float8Tensor(self.codes, self.scale, block_size=block, dtype=like.dtype)
        return tensor
