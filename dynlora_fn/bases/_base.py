"""The methods that every base has, and the adapter for a plain tensor."""

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
    """A difference ``factors.b @ factors.a / divisor`` that is not folded yet."""

    factors: Factors
    divisor: float


class Base(Protocol):
    """The methods that every base has. `as_base` returns an object with these methods.

    Methods return bases in the form in which a weight stores them, so a plain tensor stays a plain tensor. Methods that
    read all rows of a sharded base are collective: call them on every process. A `Deferred` base has no `map_rows`,
    `by_rows`, `of_all_rows`, `transposed` and `flatten`, because products and shards need a base without pending folds.
    """

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight, (*stack, out, in), with all rows."""

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype in which full-rank training would store the weight."""

    @property
    def sum_dtype(self) -> torch.dtype:
        """The narrowest dtype in which sums with this base may be computed.

        This is the dtype of a dense base, and float32 for other bases.
        """

    @property
    def wrong_dtype(self) -> str | None:
        """A description of a tensor whose dtype the format does not have, or None."""

    @property
    def sharding(self) -> Sharding | None:
        """Which rows this process stores, or None if it stores all rows."""

    @property
    def residual(self) -> Residual:
        """The residual of the codes that this process stores, or () if there is none."""

    @property
    def folded(self) -> StoredBase:
        """The base without its pending folds."""

    @property
    def pending_folds(self) -> list[PendingFold]:
        """The pending folds."""

    def with_folded(self, folded: StoredBase, *, divisor: float) -> StoredBase:
        """Return a base of this kind that contains `folded`, with nothing pending.

        `divisor` is the divisor of the weight, ``rank / alpha``.
        """

    def map_folded(self, change: Any) -> StoredBase:
        """Apply `change` to the base under the pending folds, which stay pending."""

    def fold_pending(self, *, name: str) -> StoredBase:
        """Fold all pending folds. Return a base of the same kind with nothing pending."""

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the dense base that products read, without the residual.

        The conversion is one custom operation that a compiler does not inline, so only one dense weight is alive at a
        time.
        """

    def as_tensor(self, dtype: torch.dtype) -> Tensor:
        """Return the dense base that products read.

        A plain tensor is returned unchanged, in any dtype. Codes are decoded to `dtype`.
        """

    def exact(self, dtype: torch.dtype) -> Tensor:
        """Return the dense base plus residual and pending folds, in new memory."""

    def fold(self, left: Tensor, right: Tensor, *, divisor: float, name: str) -> StoredBase:
        """Return ``base + left @ right / divisor`` in the storage format of this base.

        See `_fold.fold` for the arithmetic and `quantize` for the residual. A `Deferred` base appends the difference to
        its pending folds.

        Args:
            left: The left factor of the difference, (*stack, out, count). For a sharded base it may have only the rows
                of this process.
            right: The right factor of the difference, (*stack, count, in).
            divisor: The divisor, ``rank / alpha`` of the weight.
            name: The name of the weight, for error messages.

        Raises:
            ValueError: If the new weight of a quantized base is not finite, in a compiled function too. Also if `count`
                exceeds the number of vectors that a deferred base has room for.
        """

    def add(self, change: Tensor, *, name: str) -> StoredBase:
        """Return ``base + change`` for a dense difference (*stack, out, in).

        The difference is never deferred.

        Raises:
            ValueError: If the new weight of a quantized base is not finite, in a compiled function too.
        """

    def scaled(self, factor: float | Tensor, *, name: str) -> StoredBase:
        """Return ``factor * base``, with residual and pending folds scaled too.

        If the scales of the format are fine enough, only the scales change, and a residual in bfloat16 is rounded up or
        down at random. mxfp4, bfloat16, and nf4 with scales in half precision are encoded again from codes and
        residual. Without a residual they do not change if the factor is too close to 1.

        Args:
            factor: A finite number, or a 0-d tensor on the device of the base.
            name: The name of the weight, for error messages.
        """

    def gather(self) -> StoredBase:
        """Return the base with all rows, and its residual."""

    def map_rows(self, change: RowMap, sharding: Sharding) -> StoredBase:
        """Apply `change` to every tensor that has the rows of the base."""

    def by_rows(self, name: str, sharding: Sharding) -> StoredBase:
        """Return the same base in codes whose rows can be split over processes.

        Raises:
            ValueError: If the format cannot be split over these processes.
        """

    def of_all_rows(self) -> StoredBase:
        """Reverse `by_rows` for a gathered base if that keeps every value."""

    def transposed(self) -> StoredBase:
        """Return the base of the transposed weight, for one product."""

    def flatten(self) -> Flattened:
        """Return the layout and the tensors that products read.

        `gather_codes` rebuilds the codes from them.
        """

    def to_torchao(self) -> Tensor:
        """Return torchao's tensor with the codes of this base, or a dense base unchanged."""


class Dense(NamedTuple):
    """A plain tensor with the methods of `Base`.

    It is never stored. A weight stores the tensor itself.
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
    def wrong_dtype(self) -> None:
        return None

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
        return flatten(self.tensor)

    def to_torchao(self) -> Tensor:
        return self.tensor


def as_base(base: StoredBase) -> Base:
    """Return a base with the methods of `Base`: wrap a plain tensor in `Dense`."""
    answering: Base = Dense(base) if isinstance(base, Tensor) else base
    return answering


_PLAIN = Layout("plain")


def flatten(base: StoredBase) -> Flattened:
    """Return what `Base.flatten` returns. This needs no adapter for a plain tensor."""
    if isinstance(base, Tensor):
        return Flattened(_PLAIN, [base])
    flattened: Flattened = base.flatten()
    return flattened
