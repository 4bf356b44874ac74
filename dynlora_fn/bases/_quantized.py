"""Quantized bases, and their transpose inside one product."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dynlora_fn._core._torch import tree_map
from dynlora_fn._core._types import Sharding
from dynlora_fn.bases._base import PendingFold, StoredBase, as_base
from dynlora_fn.bases._flatten import Flattened, Layout
from dynlora_fn.bases._format import RowMap
from dynlora_fn.bases._formats import Codes, as_format, codes_from_tensors, stored
from dynlora_fn.bases._ops import dequantize
from dynlora_fn.bases._refusals import refuse, refuse_attached
from dynlora_fn.bases._residual import (
    Residual,
    residual_codes,
    residual_from_tensors,
    residual_tensors,
    scaled_residual,
)
from dynlora_fn.bases._rewrite import decode_exact


class Quantized(NamedTuple):
    """A base in low precision: codes, and a residual with their rounding error.

    Products read only the codes. A fold starts from ``codes + residual``, so the error does not exceed one quantization
    error, even after ten thousand switches. A base without a residual takes less memory, but the errors of all folds
    add up.
    """

    codes: Codes
    residual: Residual  # may be in host memory
    like: Float[Tensor, "*stack 0"]  # empty; its dtype is the dtype of torchao's tensor of this weight

    @property
    def shape(self) -> torch.Size:
        return as_format(self.codes).shape

    @property
    def weight_dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def sum_dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def wrong_dtype(self) -> str | None:
        for codes in (as_format(self.codes), residual_codes(self.residual)):
            for tensor, dtypes in zip(codes, codes.dtypes, strict=True) if codes else ():
                if tensor.dtype not in dtypes:
                    return f"a tensor of dtype {tensor.dtype}, where its format has {dtypes[0]},"
        return None

    @property
    def sharding(self) -> None:
        return None

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

    def fold_pending(self, *, name: str) -> "Quantized":
        return self

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return dequantize(as_format(self.codes), dtype)

    def as_tensor(self, dtype: torch.dtype) -> Tensor:
        return self.dequantize(dtype)

    def exact(self, dtype: torch.dtype) -> Tensor:
        return decode_exact(as_format(self.codes), self.residual, dtype)

    def fold(self, left: Tensor, right: Tensor, *, divisor: float, name: str) -> "Quantized":
        return self._rewritten(torch.ops.dynlora_fn.fold_codes, left, right, float(divisor), name)

    def add(self, change: Tensor, *, name: str) -> "Quantized":
        return self._rewritten(torch.ops.dynlora_fn.add_to_codes, change, name)

    def scaled(self, factor: float | Tensor, *, name: str) -> "Quantized":
        # Without this, a format that only multiplies its scales would return scales with a gradient, which no product
        # supports.
        refuse_attached("gradient, fold", (factor, self), name=name)
        scaled = as_format(self.codes).scaled(factor)
        if scaled is not None:
            return self._replace(
                codes=stored(scaled), residual=scaled_residual(self.residual, factor, list(scaled)[-1])
            )
        factor_tensor = torch.as_tensor(factor, device=self.like.device)
        return self._rewritten(torch.ops.dynlora_fn.scale_codes, factor_tensor, name)

    def _rewritten(self, operation: Any, *arguments: Any) -> "Quantized":
        codes = as_format(self.codes)
        count = len(list(codes))
        new = operation(list(codes), codes.kind, residual_tensors(self.residual), *arguments)
        new_codes = codes_from_tensors(codes.kind, new[:count])
        return Quantized(stored(new_codes), residual_from_tensors(new[count:]), self.like)

    def gather(self) -> "Quantized":
        return self

    def map_rows(self, change: RowMap, sharding: Sharding) -> "Quantized":
        codes = as_format(self.codes).map_rows(change, sharding)
        return self._replace(codes=stored(codes), residual=tree_map(lambda leaf: change(leaf, sharding), self.residual))

    def by_rows(self, name: str, sharding: Sharding) -> "Quantized":
        return self._replace(codes=stored(as_format(self.codes).by_rows(name, sharding)))

    def of_all_rows(self) -> "Quantized":
        return self._replace(codes=stored(as_format(self.codes).of_all_rows()))

    def transposed(self) -> StoredBase:
        return self.codes.mT if isinstance(self.codes, Tensor) else Transposed(self)

    def flatten(self) -> Flattened:
        codes = as_format(self.codes)
        return Flattened(Layout(codes.kind), list(codes))

    def to_torchao(self) -> Tensor:
        if len(self.shape) != 2:
            refuse("torchao, stack", shape=tuple(self.shape))
        return as_format(self.codes).to_torchao(self.like)


class Transposed(NamedTuple):
    """The transpose ``base.mT`` of a base whose codes cannot be transposed.

    It is the base of a `LowRank` only inside one product, so it has only the methods that products call.
    """

    base: StoredBase  # Quantized or Sharded

    @property
    def shape(self) -> torch.Size:
        *stack, rows, columns = as_base(self.base).shape
        return torch.Size((*stack, columns, rows))

    @property
    def folded(self) -> StoredBase:
        return self

    @property
    def pending_folds(self) -> list[PendingFold]:
        return []

    @property
    def sharding(self) -> Sharding | None:
        return as_base(self.base).sharding

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return as_base(self.base).dequantize(dtype).mT

    def as_tensor(self, dtype: torch.dtype) -> Tensor:
        return self.dequantize(dtype)

    def transposed(self) -> StoredBase:
        return self.base

    def flatten(self) -> Flattened:
        layout, tensors = as_base(self.base).flatten()
        return Flattened(layout._replace(is_transposed=True), tensors)
