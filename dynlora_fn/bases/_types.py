"""The tuples that a base can be: quantized, sharded, deferred, transposed."""

from typing import NamedTuple, TypeAlias

from jaxtyping import Float
from torch import Tensor

from dynlora_fn._core._types import Factors, Sharding
from dynlora_fn.bases._formats import Codes, Residual


class Transposed(NamedTuple):
    """``base.mT`` of codes, which have no transpose of their own. The base of a `LowRank` within one product."""

    base: "Quantized | Sharded"


class Quantized(NamedTuple):
    """A base in low precision: products see the codes alone, and what these miss is kept for the next fold.

    The residual is what makes a base survive ten thousand switches: a fold starts from ``codes + residual``, so that
    the error stays that of quantizing once. Without one its memory is saved, and the errors of all folds add up.
    """

    codes: Codes
    residual: Residual  # may lie in host memory
    like: Float[Tensor, "*stack 0"]  # empty, of the dtype that torchao's tensor stands for


class Sharded(NamedTuple):
    """A base of which this process holds some rows, in full precision or codes with their residual. It is gathered, as
    it is stored, for each product, and folded into where its rows are."""

    base: "LocalBase"  # (*stack, rows of this process, in)
    sharding: Sharding


class Deferred(NamedTuple):
    """A base whose latest folds wait: ``base + pending.b @ pending.a / rank``, exactly."""

    base: "FoldedBase"
    pending: Factors  # b (*stack, out, vectors), a (*stack, vectors, in)


LocalBase: TypeAlias = Tensor | Quantized  # by one process as a whole
FoldedBase: TypeAlias = LocalBase | Sharded  # in which nothing waits
Base: TypeAlias = FoldedBase | Deferred
