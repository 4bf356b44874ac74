"""Plain tensors as codes: bfloat16, and dense weights of any dtype."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dynlora_fn._core._types import Sharding
from dynlora_fn.bases._format import RowMap


class Plain(NamedTuple):
    """A plain tensor with the methods of `Format`.

    It is never stored. A base stores the tensor itself.
    """

    tensor: Float[Tensor, "*stack out in"]

    @property
    def kind(self) -> str:
        return "plain"

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def dtypes(self) -> Sequence[Sequence[torch.dtype]]:
        return ((torch.bfloat16,),)

    @property
    def sum_dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def half_step(self) -> float:
        return 2**-8  # of bfloat16

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
    def empty(cls, name: str, weight: Tensor, dtype: torch.dtype | None = None) -> "Plain":
        return cls(weight.new_empty(weight.shape, dtype=dtype or torch.bfloat16))

    def encode(self, weight: Tensor, *, again: bool = False) -> "Plain":
        return Plain(weight.to(self.tensor.dtype, copy=True))

    def encode_error(self, error: Tensor) -> "Plain":
        """Encode the rounding error of other codes."""
        return self.encode(error)

    def decode(self, dtype: torch.dtype) -> Tensor:
        return self.tensor.to(dtype)

    def decode_into(self, target: Tensor) -> None:
        target.copy_(self.tensor)

    def scaled(self, factor: float | Tensor) -> "Plain | None":
        if torch.promote_types(self.tensor.dtype, torch.float32) != self.tensor.dtype:
            return None
        return Plain((self.tensor * factor).to(self.tensor.dtype))

    def map_rows(self, change: RowMap, sharding: Sharding) -> "Plain":
        return Plain(change(self.tensor, sharding))

    def by_rows(self, name: str, sharding: Sharding) -> "Plain":
        return self

    def of_all_rows(self) -> "Plain":
        return self

    @classmethod
    def from_torchao(cls, tensor: Any) -> "Plain | None":
        return None

    def to_torchao(self, like: Tensor) -> Tensor:
        return self.tensor
