"""What every storage format answers."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol, Self, TypeAlias

import torch
from torch import Tensor

from dynlora_fn._core._types import Sharding

RowMap: TypeAlias = Callable[[Tensor, Sharding], Tensor]


class Format(Protocol):
    """The codes of one weight or of a stack, in one storage format.

    A format is a NamedTuple of tensors. The first one has the rows of the weight, and all have the leading axes
    `*stack`. The type says the format; shapes and dtypes say its details.
    """

    def __iter__(self) -> Iterator[Any]:
        """Return the tensors of the codes."""

    @property
    def kind(self) -> str:
        """The name of the format in `BY_KIND`, which operations on codes take."""

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight, (*stack, out, in)."""

    @property
    def sum_dtype(self) -> torch.dtype:
        """The least dtype in which sums are computed: float32 for codes.

        For a plain tensor it is the dtype of the tensor.
        """

    @property
    def half_step(self) -> float:
        """The largest half step of the codes, over the largest entry of a weight."""

    @property
    def is_tied(self) -> bool:
        """Whether one entry may change the codes of other rows."""

    @property
    def keeps_half_precision(self) -> bool:
        """Whether torchao's tensor of a weight keeps half precision as its dtype."""

    @classmethod
    def dtype_of(cls, config: Any) -> torch.dtype | None:
        """Return the dtype of the codes that a configuration of torchao requests.

        The result is None if the configuration requests another format.
        """

    @classmethod
    def empty(cls, name: str, weight: Tensor, dtype: torch.dtype | None = None) -> Self:
        """Return uninitialized codes for one weight (out, in).

        Args:
            name: The name of the weight, for error messages.
            weight: The weight whose shape, device and dtype the codes are for.
            dtype: The dtype of the codes, for a format with several. Default None means the usual one.

        Raises:
            ValueError: If the blocks of the format do not divide the weight.
        """

    def encode(self, weight: Tensor, *, again: bool = False) -> Self:
        """Encode a weight (out, in), in float32 at least, in the layout of these codes.

        With `again`, the weight was decoded from such codes. What its codes already say is then kept where encoding
        would change it a little each time.
        """

    def decode(self, dtype: torch.dtype) -> Tensor:
        """Decode to a dense weight (*stack, out, in).

        The values are those of torchao's ``dequantize``, except for the last rounding.
        """

    def decode_into(self, target: Tensor) -> None:
        """Decode one weight into an existing tensor, such as a view of a larger matrix."""

    def scaled(self, factor: float | Tensor) -> Self | None:
        """Return the codes of ``factor * weight``. Only scales are rounded.

        `factor` is a number or a 0-d tensor on the device of the codes. The last tensor of the result is a scale in
        float32 that was multiplied. The result is None if scales of this format are too coarse, so that the weight must
        be encoded again.
        """

    def map_rows(self, change: RowMap, sharding: Sharding) -> Self:
        """Apply `change` to every tensor that has the rows of the weight."""

    def by_rows(self, name: str, sharding: Sharding) -> Self:
        """Return codes with the same values whose rows can be split over processes.

        Raises:
            ValueError: If that is impossible. `name` is the name of the weight.
        """

    def of_all_rows(self) -> Self:
        """Reverse `by_rows` for gathered codes where that loses nothing."""

    @classmethod
    def from_torchao(cls, tensor: Any) -> Self | None:
        """Return codes that are views of the inner tensors of a torchao matrix.

        The result is None if the tensor has another format or layout.
        """

    def to_torchao(self, like: Tensor) -> Tensor:
        """Return torchao's tensor with these codes, in the dtype of `like`."""
