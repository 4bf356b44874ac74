"""Deferred bases. Their folds stay pending, so that codes are encoded less often."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dynlora_fn._core._dtypes import widest
from dynlora_fn._core._torch import register_constant
from dynlora_fn._core._types import Factors, Sharding
from dynlora_fn.bases._base import PendingFold, StoredBase, as_base
from dynlora_fn.bases._fold import fold
from dynlora_fn.bases._refusals import refuse
from dynlora_fn.bases._residual import Residual


@dataclass(frozen=True)
class Divisor:
    """The divisor of pending folds: the ``rank / alpha`` of the weight.

    It is set when the weight is deferred, merged or resized. Pending folds keep it even if the factors are replaced by
    factors of another rank. It is a constant and not a tensor, so a checkpoint does not store it but compares it. For
    that, `resize` sets it to the divisor of a weight that was deferred at the new rank.
    """

    value: float


register_constant(Divisor)  # a node without leaves, so that the leaves of every tree are tensors


class Deferred(NamedTuple):
    """A base with pending folds, ``base + pending.b @ pending.a / divisor.value``.

    `defer` creates it, and `fold_pending` folds what is pending.
    """

    base: StoredBase
    pending: Factors  # b (*stack, out, vectors), a (*stack, vectors, in)
    divisor: Divisor

    @property
    def shape(self) -> torch.Size:
        return as_base(self.base).shape

    @property
    def weight_dtype(self) -> torch.dtype:
        return as_base(self.base).weight_dtype

    @property
    def sum_dtype(self) -> torch.dtype:
        return widest(
            as_base(self.base).sum_dtype
        )  # float32 at least, because pending vectors are not of the base's dtype

    @property
    def sharding(self) -> Sharding | None:
        return as_base(self.base).sharding

    @property
    def wrong_dtype(self) -> str | None:
        return as_base(self.base).wrong_dtype

    @property
    def residual(self) -> Residual:
        return as_base(self.base).residual

    @property
    def folded(self) -> StoredBase:
        return self.base

    @property
    def pending_folds(self) -> list[PendingFold]:
        return [PendingFold(self.pending, self.divisor.value)]

    def with_folded(self, folded: StoredBase, *, divisor: float) -> "Deferred":
        b, a = self.pending
        return Deferred(folded, Factors(torch.zeros_like(b), torch.zeros_like(a)), Divisor(divisor))

    def map_folded(self, change: Callable[[StoredBase], StoredBase]) -> "Deferred":
        return self._replace(base=change(self.base))

    def fold_pending(self, *, name: str) -> "Deferred":
        (b, a), divisor = self.pending, self.divisor.value
        return self.with_folded(as_base(self.base).fold(b, a, divisor=divisor, name=name), divisor=divisor)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        b, a = self.pending
        return fold(as_base(self.base).dequantize(dtype), b, a, divisor=self.divisor.value)

    def as_tensor(self, dtype: torch.dtype) -> Tensor:
        return self.dequantize(dtype)

    def exact(self, dtype: torch.dtype) -> Tensor:
        b, a = self.pending
        return fold(as_base(self.base).exact(dtype), b, a, divisor=self.divisor.value)

    def fold(self, left: Tensor, right: Tensor, *, divisor: float, name: str) -> "Deferred":
        """Append a difference to the pending vectors, and fold as many of the oldest."""
        b, a = self.pending
        count, room = left.shape[-1], b.shape[-1]
        if count > room:
            refuse("fold, deferred", name=name, room=room, count=count)
        folded = as_base(self.base).fold(b[..., :count], a[..., :count, :], divisor=self.divisor.value, name=name)
        if divisor != self.divisor.value:
            left = left * (self.divisor.value / divisor)
        pending_b = torch.cat([b[..., count:], left.to(b.dtype)], -1)
        pending_a = torch.cat([a[..., count:, :], right.to(a.dtype)], -2)
        return Deferred(folded, Factors(pending_b, pending_a), self.divisor)

    def add(self, change: Tensor, *, name: str) -> "Deferred":
        # Folded at once: pending folds are low-rank, and `change` is not.
        return self._replace(base=as_base(self.base).add(change, name=name))

    def scaled(self, factor: float | Tensor, *, name: str) -> "Deferred":
        b = (self.pending.b * factor).to(self.pending.b.dtype)
        return Deferred(as_base(self.base).scaled(factor, name=name), self.pending._replace(b=b), self.divisor)

    def gather(self) -> "Deferred":
        return self._replace(base=as_base(self.base).gather())

    def to_torchao(self) -> Tensor:
        return as_base(self.gather().fold_pending(name="params").base).to_torchao()
