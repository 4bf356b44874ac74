"""The tuples everything here is made of.

``*stack`` stands for any number of leading axes: weights of one shape that repeat over layers live in one tuple.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int, Int8, UInt8
from torch import Tensor
from torch.utils._pytree import register_constant

Side: TypeAlias = Literal["b", "a"]


class Factors(NamedTuple):
    """The trained low-rank factors of one weight. Slot k is the pair ``b[..., :, k]``, ``a[..., k, :]``."""

    b: Float[Tensor, "*stack out rank"]
    a: Float[Tensor, "*stack rank in"]


class Int8Codes(NamedTuple):
    """``codes * scale``, a scale for each row: the inner tensors of torchao's symmetric Int8Tensor."""

    codes: Int8[Tensor, "*stack out in"]
    scale: Float[Tensor, "*stack out 1"]  # float32


class Float8Codes(NamedTuple):
    """``codes * scale``, a scale for each row: the inner tensors of torchao's Float8Tensor."""

    codes: Float[Tensor, "*stack out in"]  # float8_e4m3fn or float8_e5m2
    scale: Float[Tensor, "*stack out 1"]  # float32


class NF4Codes(NamedTuple):
    """4-bit quantiles of a normal distribution, scaled by blocks; the scales in turn are 8-bit numbers, scaled by
    blocks of blocks (arXiv:2305.14314): the inner tensors of torchao's NF4Tensor, which cuts the weight into blocks
    row after row."""

    codes: UInt8[Tensor, "*stack out half_in"]  # two numbers a byte, the first one above
    scales: Int8[Tensor, "*stack blocks"]
    factor: Float[Tensor, "*stack scale_blocks"]  # a block's scale is ``scales / factor + mean``
    mean: Float[Tensor, "*stack"]


class NVFP4Codes(NamedTuple):
    """``codes * scale * factor``, 4-bit floating point in blocks of 16: the inner tensors of torchao's NVFP4Tensor, a
    prototype there."""

    codes: UInt8[Tensor, "*stack out half_in"]  # two numbers a byte, the first one below
    scale: Float[Tensor, "*stack rows blocks"]  # float8_e4m3fn; (out, blocks), or in tiles as tensor cores read them
    factor: Float[Tensor, "..."]  # float32, (*stack); (*stack, out, 1) where rows lie on several processes


class MXFP4Codes(NamedTuple):
    """``codes * 2 ** (scale - 127)``, 4-bit floating point in blocks of 32: the inner tensors of torchao's MXTensor, a
    prototype there."""

    codes: UInt8[Tensor, "*stack out half_in"]  # two numbers a byte, the first one below
    scale: UInt8[Tensor, "*stack out blocks"]  # the bits of torchao's float8_e8m0fnu, which Inductor does not know


Codes: TypeAlias = Int8Codes | Float8Codes | NF4Codes | NVFP4Codes | MXFP4Codes | Tensor  # a plain tensor: bfloat16
Residual: TypeAlias = Int8Codes | Tensor | tuple[()]  # a plain tensor: bfloat16; none is a tree without leaves


class Quantized(NamedTuple):
    """A base in low precision: products see the codes alone, and what these miss is kept for the next fold.

    The residual is what makes a base survive ten thousand switches: a fold starts from ``codes + residual``, so that
    the error stays that of quantizing once. Without one its memory is saved, and the errors of all folds add up.
    """

    codes: Codes
    residual: Residual  # may lie in host memory
    like: Float[Tensor, "*stack 0"]  # empty, of the dtype that torchao's tensor stands for


@dataclass(frozen=True)
class Sharding:
    """Which rows of a base this process holds: as many as every other, but for the last ones."""

    group: str  # the name of the process group
    size: int  # its number of processes
    rank: int  # of this one in it
    rows: int  # of the whole base, `out`
    columns: int | None = None  # `in`, where the factors are sharded as well: `b` by its rows, `a` by its columns
    part: float = 1.0  # of this process in the mean of gradients, by which those of sharded factors are reduced

    @property
    def share(self) -> int:
        """The most rows that a process holds."""
        return -(-self.rows // self.size)

    @property
    def of_columns(self) -> "Sharding":
        """The columns of `a`, as if they were rows."""
        assert self.columns is not None
        return replace(self, rows=self.columns)

    @property
    def own(self) -> slice:
        """The rows that this process holds."""
        first = min(self.rank * self.share, self.rows)
        return slice(first, min(first + self.share, self.rows))


register_constant(Sharding)  # no leaf, so that a tree of bases holds tensors alone


class Sharded(NamedTuple):
    """A base of which this process holds some rows, in full precision or codes with their residual. It is gathered, as
    it is stored, for each product, and folded into where its rows are."""

    base: "Held"  # (*stack, rows of this process, in)
    sharding: Sharding


class Deferred(NamedTuple):
    """A base whose latest folds wait: ``base + pending.b @ pending.a / rank``, exactly."""

    base: "Held | Sharded"
    pending: Factors  # b (*stack, out, vectors), a (*stack, vectors, in)


Held: TypeAlias = Tensor | Quantized  # by one process as a whole
Standing: TypeAlias = Held | Sharded  # in which nothing waits
Base: TypeAlias = Standing | Deferred


class LowRank(NamedTuple):
    """One weight, ``base + b @ a / rank`` (arXiv:2406.06564, eq. 1 with alpha = 1).

    The scale is always ``1 / rank``, so that the forward pass and a switch cannot disagree about it.
    """

    base: (
        Float[Tensor, "*stack out in"] | Quantized | Sharded | Deferred
    )  # changed by `switch` and `merge` alone, never by a gradient
    factors: Factors
    seed: Int[Tensor, "*stack"]  # names the basis that incoming vectors are drawn from

    @property
    def shape(self) -> torch.Size:
        """Of the weight, (*stack, out, in)."""
        sharding = self.factor_sharding
        if sharding is not None and sharding.columns is not None:
            return torch.Size((*self.factors.b.shape[:-2], sharding.rows, sharding.columns))
        return torch.Size((*self.factors.b.shape[:-1], self.factors.a.shape[-1]))

    @property
    def factor_sharding(self) -> Sharding | None:
        """How the factors are sharded; None if this process holds all of them."""
        sharding = self.base.sharding if isinstance(self.base, Sharded) else None
        return None if sharding is None or sharding.columns is None else sharding


class Frozen(NamedTuple):
    """What `partition` keeps of a `LowRank` out of the gradient's reach."""

    base: Base
    seed: Int[Tensor, "*stack"]


class SidePlan(NamedTuple):
    """What is switched on one side in one step. ``count`` is fixed, so that no step compiles anew; `active` says
    which entries take part; the others must name a slot all the same. Without stack axes it holds for a whole stack."""

    slots: Int[Tensor, "*stack count"]  # which slots, distinct where active
    indices: Int[Tensor, "*stack count"]  # which vectors of the basis come in; of a pool, modulo its size
    active: Bool[Tensor, "*stack count"]


class Plan(NamedTuple):
    """What one step switches in one weight, and for how many steps the counterparts are then frozen."""

    b: SidePlan
    a: SidePlan
    frozen_for: Int[Tensor, ""]


Param: TypeAlias = LowRank | Tensor
Params: TypeAlias = Mapping[str, Param]
Plans: TypeAlias = Mapping[str, Plan]
Trainable: TypeAlias = Mapping[str, Factors | Tensor]


def factor_shardings(frozen: Mapping[str, Frozen | Tensor]) -> dict[str, Sharding]:
    """Of all sharded factors by name."""
    held = {
        name: leaf.base.sharding
        for name, leaf in frozen.items()
        if isinstance(leaf, Frozen) and isinstance(leaf.base, Sharded)
    }
    return {name: sharding for name, sharding in held.items() if sharding.columns is not None}
