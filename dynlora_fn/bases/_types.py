"""The tuples that a base can be: quantized, sharded, deferred, transposed."""

from typing import NamedTuple, TypeAlias

from jaxtyping import Float
from torch import Tensor

from dynlora_fn._core._types import Factors, Sharding
from dynlora_fn.bases._formats import Codes, Residual


class Transposed(NamedTuple):
    """The transpose ``base.mT`` of codes, which cannot be transposed themselves.

    It is the base of a `LowRank` only within one product.
    """

    base: "Quantized | Sharded"


class Quantized(NamedTuple):
    """A base in low precision: codes, and a residual that stores what the codes miss.

    Products read only the codes. A fold starts from ``codes + residual``, so the error does not exceed one quantization
    error, even after ten thousand switches. Without a residual, memory is saved and the errors of all folds add up.
    """

    codes: Codes
    residual: Residual  # may be in host memory
    like: Float[Tensor, "*stack 0"]  # empty; has the dtype of the weight in torchao's tensor


class Sharded(NamedTuple):
    """The rows of a base that this process stores, dense or quantized.

    The base is all-gathered in its storage format for each product. A fold changes the rows of this process and needs
    no communication.
    """

    base: "LocalBase"  # (*stack, rows of this process, in)
    sharding: Sharding


class Deferred(NamedTuple):
    """A base with pending folds: ``base + pending.b @ pending.a / rank``, exactly."""

    base: "FoldedBase"
    pending: Factors  # b (*stack, out, vectors), a (*stack, vectors, in)


LocalBase: TypeAlias = Tensor | Quantized  # all rows on this process
FoldedBase: TypeAlias = LocalBase | Sharded  # without pending folds
Base: TypeAlias = FoldedBase | Deferred
