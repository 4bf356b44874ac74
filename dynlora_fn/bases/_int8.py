"""int8 with one scale for each row, in torchao's layout."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from dynlora_fn._core._types import Sharding
from dynlora_fn.bases import _torchao
from dynlora_fn.bases._format import RowMap
from dynlora_fn.bases._rowwise import decode_rows, decode_rows_into, empty_scale, is_by_row

# torchao's smallest scale. It rounds rows of very small values to zero, so a residual has a smaller one.
_LEAST_SCALE = torch.finfo(torch.float32).eps
_LEAST_RESIDUAL_SCALE = torch.finfo(torch.float32).tiny


class Int8Codes(NamedTuple):
    """int8 codes of a weight ``codes * scale``, with one scale for each row.

    These are the inner tensors of torchao's symmetric Int8Tensor.
    """

    codes: Int8[Tensor, "*stack out in"]
    scale: Float[Tensor, "*stack out 1"]  # float32

    @property
    def kind(self) -> str:
        return "int8"

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def dtypes(self) -> Sequence[Sequence[torch.dtype]]:
        return (torch.int8,), (torch.float32,)

    @property
    def sum_dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def half_step(self) -> float:
        return 1 / 254

    @property
    def is_tied(self) -> bool:
        return False

    @property
    def keeps_half_precision(self) -> bool:
        return True

    @classmethod
    def dtype_of(cls, config: Any) -> torch.dtype | None:
        is_int8 = isinstance(config, _torchao.Int8WeightOnlyConfig) and config.granularity == _torchao.PerRow()
        return torch.int8 if is_int8 else None

    @classmethod
    def empty(cls, name: str, weight: Tensor, dtype: torch.dtype | None = None) -> "Int8Codes":
        return cls(weight.new_empty(weight.shape, dtype=torch.int8), empty_scale(weight))

    def encode(self, weight: Tensor, *, again: bool = False) -> "Int8Codes":
        """Encode a weight, with ``scale = largest / 127.5``, or 127 if `again`.

        torchao divides by 127.5. In repeated folds, the most negative value of a row would then grow by 128 / 127.5
        each time. Without a residual it would grow without bound.
        """
        return _encode(weight, 127 if again else 127.5, _LEAST_SCALE)

    def encode_error(self, error: Tensor) -> "Int8Codes":
        """Encode the rounding error of other codes, which may be much smaller."""
        return _encode(error, 127, _LEAST_RESIDUAL_SCALE)

    def decode(self, dtype: torch.dtype) -> Tensor:
        return decode_rows(self.codes, self.scale, dtype)

    def decode_into(self, target: Tensor) -> None:
        decode_rows_into(target, self.codes, self.scale)

    def scaled(self, factor: float | Tensor) -> "Int8Codes":
        return self._replace(scale=(self.scale * factor).to(self.scale.dtype))

    def map_rows(self, change: RowMap, sharding: Sharding) -> "Int8Codes":
        return Int8Codes(change(self.codes, sharding), change(self.scale, sharding))

    def by_rows(self, name: str, sharding: Sharding) -> "Int8Codes":
        return self

    def of_all_rows(self) -> "Int8Codes":
        return self

    @classmethod
    def from_torchao(cls, tensor: Any) -> "Int8Codes | None":
        is_int8 = isinstance(tensor, _torchao.Int8Tensor) and is_by_row(tensor, tensor.scale)
        return cls(tensor.qdata, tensor.scale) if is_int8 else None

    def to_torchao(self, like: Tensor) -> Tensor:
        zero = torch.zeros_like(self.scale, dtype=torch.int8)
        block = [1, self.codes.shape[1]]
        tensor: Tensor = _torchao.Int8Tensor(self.codes, self.scale, block, like.dtype, zero_point=zero)
        return tensor


def _encode(weight: Tensor, steps: float, least_scale: float) -> Int8Codes:
    """Encode a weight (out, in) with `steps` steps from zero to each row's maximum."""
    largest = weight.abs().amax(-1, keepdim=True)
    scale = (largest / steps).clamp(min=least_scale).to(torch.float32)
    codes = (weight * (1.0 / scale)).round_().clamp_(-128, 127)
    return Int8Codes(codes.to(torch.int8), scale)
