"""The methods that every storage format has."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, Self, TypeAlias

import torch
from torch import Tensor

from dynlora_fn._core._types import Sharding

RowMap: TypeAlias = Callable[[Tensor, Sharding], Tensor]


class Format(Protocol):
    """The codes of one weight or of a stack, in one storage format.

    A format is a NamedTuple of tensors. The first tensor has the rows of the weight, and all tensors have the leading
    axes `*stack`. The type determines the format, and shapes and dtypes its details, such as the block size.
    """

    def __iter__(self) -> Iterator[Any]:
        """Return the tensors of the codes."""

    @property
    def kind(self) -> str:
        """The name of the format in `BY_KIND`, an argument of operations on codes."""

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight, (*stack, out, in)."""

    @property
    def dtypes(self) -> Sequence[Sequence[torch.dtype]]:
        """The dtypes that each tensor of stored codes may have."""

    @property
    def sum_dtype(self) -> torch.dtype:
        """The narrowest dtype in which sums may be computed: float32 for codes.

        For a plain tensor this is the dtype of the tensor.
        """

    @property
    def half_step(self) -> float:
        """A bound for the rounding error of an entry, over the weight's largest entry."""

    @property
    def is_tied(self) -> bool:
        """Whether one entry may change the codes of other rows."""

    @property
    def keeps_half_precision(self) -> bool:
        """Whether torchao's tensor of a weight in half precision has that dtype.

        If not, the tensor has dtype float32.
        """

    @classmethod
    def dtype_of(cls, config: Any) -> torch.dtype | None:
        """Return the dtype of the codes that a configuration of torchao requests.

        Return None if the configuration requests another format.
        """

    @classmethod
    def empty(cls, name: str, weight: Tensor, dtype: torch.dtype | None = None) -> Self:
        """Return uninitialized codes for one weight (out, in).

        Args:
            name: The name of the weight, for error messages.
            weight: A weight with the shape, device and dtype that the codes are for.
            dtype: The dtype of the codes, for a format with several dtypes. Default None means the format's default.

        Raises:
            ValueError: If the shape of the weight does not fit the blocks of the format.
        """

    def encode(self, weight: Tensor, *, again: bool = False) -> Self:
        """Encode a weight (out, in), in float32 at least, in the layout of these codes.

        Pass `again` if the weight was decoded from codes of this format and changed. Quantities that would otherwise
        drift a little with each encoding, such as the mean of nf4, then stay.
        """

    def decode(self, dtype: torch.dtype) -> Tensor:
        """Decode to a dense weight (*stack, out, in).

        The values are equal to torchao's ``dequantize``, except for the rounding to `dtype`.
        """

    def decode_into(self, target: Tensor) -> None:
        """Decode one weight into an existing tensor, such as a view of a larger matrix."""

    def scaled(self, factor: float | Tensor) -> Self | None:
        """Return the codes of ``factor * weight``, with other scales only.

        `factor` is a number or a 0-d tensor on the device of the codes. The last tensor of the result is a float32
        scale that was multiplied. Return None if the scales of the format are too coarse; the caller then encodes the
        weight again.
        """

    def map_rows(self, change: RowMap, sharding: Sharding) -> Self:
        """Apply `change` to every tensor that has the rows of the weight."""

    def by_rows(self, name: str, sharding: Sharding) -> Self:
        """Return codes with the same values whose rows can be split over processes.

        Raises:
            ValueError: If the format cannot be split over these processes. `name` is the name of the weight.
        """

    def of_all_rows(self) -> Self:
        """Reverse `by_rows` for gathered codes if that keeps every value."""

    @classmethod
    def from_torchao(cls, tensor: Any) -> Self | None:
        """Return codes that are views of the inner tensors of a torchao matrix.

        Return None if the tensor has another format or layout.
        """

    def to_torchao(self, like: Tensor) -> Tensor:
        """Return torchao's tensor with these codes, in the dtype of `like`."""
