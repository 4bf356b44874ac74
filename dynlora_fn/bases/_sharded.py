"""Sharded bases: the rows of a base that this process stores."""

from collections.abc import Callable
from dataclasses import astuple
from typing import NamedTuple

import torch
from torch import Tensor

from dynlora_fn._core._types import Sharding
from dynlora_fn.bases._base import PendingFold, StoredBase, as_base
from dynlora_fn.bases._flatten import Flattened, gather_codes, gather_rows
from dynlora_fn.bases._format import RowMap
from dynlora_fn.bases._ops import dequantize
from dynlora_fn.bases._quantized import Transposed
from dynlora_fn.bases._refusals import refuse
from dynlora_fn.bases._residual import Residual


class Sharded(NamedTuple):
    """The rows of a base that this process stores, dense or quantized.

    The base is all-gathered in its storage format for each product. A fold changes the rows of this process and needs
    no communication.
    """

    base: StoredBase  # a tensor or Quantized, (*stack, rows of this process, in)
    sharding: Sharding

    @property
    def shape(self) -> torch.Size:
        *stack, _, columns = as_base(self.base).shape
        return torch.Size((*stack, self.sharding.rows, columns))

    @property
    def weight_dtype(self) -> torch.dtype:
        return as_base(self.base).weight_dtype

    @property
    def sum_dtype(self) -> torch.dtype:
        return as_base(self.base).sum_dtype

    @property
    def wrong_dtype(self) -> str | None:
        return as_base(self.base).wrong_dtype

    @property
    def residual(self) -> Residual:
        return as_base(self.base).residual

    @property
    def folded(self) -> StoredBase:
        return self

    @property
    def pending_folds(self) -> list[PendingFold]:
        return []

    def with_folded(self, folded: StoredBase, *, divisor: float) -> StoredBase:
        return folded

    def map_folded(self, change: Callable[[StoredBase], StoredBase]) -> StoredBase:
        return change(self)

    def fold_pending(self, *, name: str) -> "Sharded":
        return self

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return dequantize(gather_codes(*self.flatten()), dtype)

    def as_tensor(self, dtype: torch.dtype) -> Tensor:
        return self.dequantize(dtype)

    def exact(self, dtype: torch.dtype) -> Tensor:
        return as_base(self._all_rows()).exact(dtype)

    def fold(self, left: Tensor, right: Tensor, *, divisor: float, name: str) -> "Sharded":
        return self._replace(base=as_base(self.base).fold(self._local_rows(left), right, divisor=divisor, name=name))

    def add(self, change: Tensor, *, name: str) -> "Sharded":
        return self._replace(base=as_base(self.base).add(self._local_rows(change), name=name))

    def _local_rows(self, tensor: Tensor) -> Tensor:
        """Return the rows of this process. A tensor with only these rows is unchanged."""
        return tensor[..., self.sharding.local_rows, :] if tensor.shape[-2] == self.sharding.rows else tensor

    def scaled(self, factor: float | Tensor, *, name: str) -> "Sharded":
        return self._replace(base=as_base(self.base).scaled(factor, name=name))

    def gather(self) -> StoredBase:
        return as_base(self._all_rows()).of_all_rows()

    def _all_rows(self) -> StoredBase:
        return as_base(self.base).map_rows(gather_rows, self.sharding)

    def map_rows(self, change: RowMap, sharding: Sharding) -> "Sharded":
        return self._replace(base=as_base(self.base).map_rows(change, sharding))

    def by_rows(self, name: str, sharding: Sharding) -> StoredBase:
        return refuse("shard, sharded", name=name)

    def transposed(self) -> StoredBase:
        return Transposed(self)

    def flatten(self) -> Flattened:
        layout, tensors = as_base(self.base).flatten()
        return Flattened(layout._replace(sharding=astuple(self.sharding)), tensors)

    def to_torchao(self) -> Tensor:
        return as_base(self.gather()).to_torchao()
