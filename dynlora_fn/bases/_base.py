"""What every base answers, and the adapter of a dense tensor."""

from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from dynlora_fn._core._dtypes import widest
from dynlora_fn._core._types import Factors, Sharding
from dynlora_fn.bases._flatten import Flattened, Layout
from dynlora_fn.bases._fold import fold
from dynlora_fn.bases._format import RowMap
from dynlora_fn.bases._ops import dequantize
from dynlora_fn.bases._plain import Plain
from dynlora_fn.bases._residual import Residual

StoredBase: TypeAlias = Any  # a base as a weight stores it: a tensor, or one of the tuples of this package


class PendingFold(NamedTuple):
    """A difference that is not folded yet, ``factors.b @ factors.a / divisor``."""

    factors: Factors
    divisor: float


class Base(Protocol):
    """A base that answers for itself, as `as_base` returns it.

    Methods return bases as they are stored, so that a plain tensor stays one. Those that read all rows are collective
    if the base is sharded: call them on every process. Products and shards need a base without pending folds: a
    `Deferred` base has no `map_rows`, `by_rows`, `of_all_rows`, `transposed` and `flatten`.
    """

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight, (*stack, out, in), with all rows."""

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype in which full-rank training would store the weight."""

    @property
    def sum_dtype(self) -> torch.dtype:
        """The least dtype in which sums with this base are computed.

        It is the dtype of a dense base, and float32 for other bases.
        """

    @property
    def sharding(self) -> Sharding | None:
        """Which rows this process stores, or None for all."""

    @property
    def residual(self) -> Residual:
        """What the codes that this process stores miss, or () without codes or residual."""

    @property
    def folded(self) -> StoredBase:
        """The base without its pending folds."""

    @property
    def pending_folds(self) -> list[PendingFold]:
        """The pending folds."""

    def with_folded(self, folded: StoredBase, *, divisor: float) -> StoredBase:
        """Return `folded` as a base of the same kind, with nothing pending.

        `divisor` is the divisor of the weight.
        """

    def map_folded(self, change: Any) -> StoredBase:
        """Apply `change` to the base without its pending folds, and keep those pending."""

    def fold_pending(self, *, name: str) -> StoredBase:
        """Fold the pending folds, and return a base of the same kind without any."""

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the dense base that products read, without the residual.

        A conversion is one operation that a compiler cannot look into, so only one dense weight is alive at a time.
        """

    def as_tensor(self, dtype: torch.dtype) -> Tensor:
        """Return the dense base that products read.

        A plain tensor is returned unchanged, and codes are decoded to `dtype`.
        """

    def exact(self, dtype: torch.dtype) -> Tensor:
        """Return the dense base with residual and pending folds, in new memory."""

    def fold(self, left: Tensor, right: Tensor, *, divisor: float, name: str) -> StoredBase:
        """Return ``base + left @ right / divisor`` in the storage format of this base.

        See `_fold.fold` for a dense base and `quantize` for the residual.

        Args:
            left: The left factor of the difference, (*stack, out, count). For a sharded base it may have only the rows
                of this process.
            right: The right factor of the difference, (*stack, count, in).
            divisor: The divisor, ``rank / alpha`` of the weight.
            name: The name of the weight, for error messages.

        Raises:
            ValueError: If the new weight of a quantized base is not finite, in a compiled function too. Also if a fold
                has more vectors than a deferred base has room for.
        """

    def add(self, change: Tensor, *, name: str) -> StoredBase:
        """Return ``base + change`` for a dense difference (*stack, out, in).

        The difference is never deferred.

        Raises:
            ValueError: If the new weight of a quantized base is not finite, in a compiled function too.
        """

    def scaled(self, factor: float | Tensor, *, name: str) -> StoredBase:
        """Return the base of ``factor * weight``, pending folds included.

        Codes are kept and their scales multiplied where the format allows it. A residual in bfloat16 is then rounded
        up or down at random. Other formats, mxfp4 and bfloat16, are encoded again from codes and residual. Without a
        residual they lose factors too near to one, as they lose small folds.

        Args:
            factor: A finite number, or a 0-d tensor on the device of the base.
            name: The name of the weight, for error messages.
        """

    def gather(self) -> StoredBase:
        """Return the base with all rows, its residual included."""

    def map_rows(self, change: RowMap, sharding: Sharding) -> StoredBase:
        """Apply `change` to every tensor that has the rows of the base."""

    def by_rows(self, name: str, sharding: Sharding) -> StoredBase:
        """Return the same base, in codes whose rows can be split over processes.

        Raises:
            ValueError: If that is impossible.
        """

    def of_all_rows(self) -> StoredBase:
        """Reverse `by_rows` for a gathered base where that loses nothing."""

    def transposed(self) -> StoredBase:
        """Return the base of the transposed weight, for one product."""

    def flatten(self) -> Flattened:
        """Return the layout and the tensors that products read.

        `gather_codes` reverses it.
        """

    def to_torchao(self) -> Tensor:
        """Return torchao's tensor with the codes of this base, and a dense base unchanged."""


class Dense(NamedTuple):
    """A plain tensor that answers as a base does.

    It is never stored: a weight stores the tensor.
    """

    tensor: Float[Tensor, "*stack out in"]

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def weight_dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def sum_dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def sharding(self) -> None:
        return None

    @property
    def residual(self) -> tuple[()]:
        return ()

    @property
    def folded(self) -> StoredBase:
        return self.tensor

    @property
    def pending_folds(self) -> list[PendingFold]:
        return []

    def with_folded(self, folded: StoredBase, *, divisor: float) -> StoredBase:
        return folded

    def map_folded(self, change: Any) -> StoredBase:
        return change(self.tensor)

    def fold_pending(self, *, name: str) -> StoredBase:
        return self.tensor

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return dequantize(Plain(self.tensor), dtype)

    def as_tensor(self, dtype: torch.dtype) -> Tensor:
        return self.tensor

    def exact(self, dtype: torch.dtype) -> Tensor:
        return self.tensor.to(dtype, copy=True)

    def fold(self, left: Tensor, right: Tensor, *, divisor: float, name: str) -> StoredBase:
        return fold(self.tensor, left, right, divisor=divisor)

    def add(self, change: Tensor, *, name: str) -> StoredBase:
        return (self.tensor + change).to(self.tensor.dtype)

    def scaled(self, factor: float | Tensor, *, name: str) -> StoredBase:
        return (self.tensor.to(widest(self.tensor.dtype)) * factor).to(self.tensor.dtype)

    def gather(self) -> StoredBase:
        return self.tensor

    def map_rows(self, change: RowMap, sharding: Sharding) -> StoredBase:
        return change(self.tensor, sharding)

    def by_rows(self, name: str, sharding: Sharding) -> StoredBase:
        return self.tensor

    def of_all_rows(self) -> StoredBase:
        return self.tensor

    def transposed(self) -> StoredBase:
        return self.tensor.mT

    def flatten(self) -> Flattened:
        return Flattened(Layout("plain"), [self.tensor])

    def to_torchao(self) -> Tensor:
        return self.tensor


def as_base(base: StoredBase) -> Base:
    """Return a base that answers for itself. Only a plain tensor is not one already."""
    answering: Base = Dense(base) if isinstance(base, Tensor) else base
    return answering
