"""The types that all packages share: weights, factors, plans and shardings.

``*stack`` means any number of leading axes: repeated weights of one shape are stacked in one tuple.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias, TypeGuard

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from dynlora_fn._core._check import check_number
from dynlora_fn._core._torch import register_constant

Side: TypeAlias = Literal["b", "a"]


class Factors(NamedTuple):
    """The trained low-rank factors of one weight.

    Slot k is the pair ``b[..., :, k]``, ``a[..., k, :]``.
    """

    b: Float[Tensor, "*stack out rank"]
    a: Float[Tensor, "*stack rank in"]


@dataclass(frozen=True)
class Alpha:
    """The alpha of a weight, as in PEFT: its product is ``alpha / rank * b @ a``.

    It is no tensor, so that a compiled step has it as a constant.
    """

    value: float

    def __post_init__(self) -> None:
        value = check_number("alpha", self.value)
        if value == 0:
            raise ValueError("`alpha` is 0, with which factors change no weight; use a number above 0")
        object.__setattr__(self, "value", float(value))


@dataclass(frozen=True)
class Sharding:
    """Which rows of a base this process stores.

    Every process stores equally many rows, and the last ones store fewer if the number does not divide.
    """

    group: str  # the name of the process group
    world_size: int
    process: int  # the index of this process in the group
    rows: int  # `out` of the unsharded base
    columns: int | None = None  # `in`, in the sharding of factors: `b` by its rows, `a` by its columns
    weight: float = 1.0  # of this process in the mean of the gradients of sharded factors
    alpha: float = 1.0  # of the weight, in the sharding of factors

    @property
    def rows_per_process(self) -> int:
        """The most rows that a process stores."""
        return -(-self.rows // self.world_size)

    @property
    def as_columns(self) -> "Sharding":
        """The columns of `a`, as if they were rows."""
        assert self.columns is not None
        return replace(self, rows=self.columns)

    @property
    def local_rows(self) -> slice:
        """The rows that this process stores."""
        first = min(self.process * self.rows_per_process, self.rows)
        return slice(first, min(first + self.rows_per_process, self.rows))


@dataclass(frozen=True)
class FixedSide:
    """What the trained factor `b` must know about the side `a`, which is not trained."""

    columns: int  # `in` of the weight
    alpha: float = 1.0  # of the weight


register_constant(Alpha)  # nodes without leaves, so that the leaves of every tree are tensors
register_constant(Sharding)
register_constant(FixedSide)


class ScaledFactors(NamedTuple):
    """The factors of a weight whose alpha is not 1.

    With an alpha of 1 they are `Factors`. Gradients, moments and updates have this type too, because `torch.func` and
    `tree_map` keep it. So alpha cannot differ between the forward pass, a switch and an update.
    """

    b: Float[Tensor, "*stack out rank"]
    a: Float[Tensor, "*stack rank in"]
    alpha: Alpha


class ShardedFactors(NamedTuple):
    """The shards of factors of this process: rows of `b` and columns of `a`.

    Gradients, moments and updates of sharded factors have this type too, because `torch.func` and `tree_map` keep it.
    So whoever combines the entries of a factor sees that it has a part of them.
    """

    b: Float[Tensor, "*stack rows rank"]
    a: Float[Tensor, "*stack rank columns"]
    sharding: Sharding  # with `columns`


class OneSidedFactors(NamedTuple):
    """The factors of a weight that trains only `b`.

    The rows of `a` are orthogonal, and all have the length ``sqrt(rank / |alpha|)``. They come from the basis seed, and
    only a switch replaces them. `partition` moves `a` into the frozen tree and leaves ``()`` in its place, so that
    gradients, moments and updates have one tensor.
    """

    b: Float[Tensor, "*stack out rank"]
    a: Any  # (*stack, rank, in), or () in the trainable tree and in what mirrors it
    fixed: FixedSide


AnyFactors: TypeAlias = Factors | ScaledFactors | ShardedFactors | OneSidedFactors


def is_factors(leaf: Any) -> TypeGuard[AnyFactors]:
    """Return whether a leaf of the trainable tree has factors.

    They may be sharded, and of one side or both.
    """
    return isinstance(leaf, Factors | ScaledFactors | ShardedFactors | OneSidedFactors)


def sides_of(factors: AnyFactors) -> tuple[Any, ...]:
    """Return `b` and `a` of factors, or only `b` where `a` is not trained."""
    return (factors.b,) if isinstance(factors.a, tuple) and not factors.a else (factors.b, factors.a)


def with_sides(factors: AnyFactors, sides: Sequence[Any]) -> Any:
    """Return factors with other sides, as many as `sides_of` returns."""
    return factors._replace(b=sides[0]) if len(sides) == 1 else factors._replace(b=sides[0], a=sides[1])


def alpha_of(factors: AnyFactors) -> float:
    """Return the alpha of the weight that factors, or their gradients, belong to."""
    if isinstance(factors, Factors):
        return 1.0
    if isinstance(factors, OneSidedFactors):
        return factors.fixed.alpha
    return factors.alpha.value if isinstance(factors, ScaledFactors) else factors.sharding.alpha


def with_alpha(factors: Factors, alpha: float) -> Factors | ScaledFactors:
    """Return factors as those of a weight with an alpha."""
    return factors if alpha == 1 else ScaledFactors(factors.b, factors.a, Alpha(alpha))


def divisor_of(rank: int, alpha: float) -> float:
    """Return ``rank / alpha``, which divides the product of factors.

    With an alpha of 1 it is the integer, so that bits and graphs are those of a division by the rank.
    """
    return rank if alpha == 1 else rank / alpha


class LowRank(NamedTuple):
    """A low-rank weight, ``base + alpha / rank * b @ a``.

    This is equation 1 of arXiv:2406.06564. Alpha is 1 for `Factors`, and part of the type of `ScaledFactors`. All
    functions read it there, so the forward pass and a switch cannot disagree about it.
    """

    # A plain tensor or a tuple of `dynlora_fn.bases`. Only transforms such as `switch` and `merge` change it.
    base: Float[Tensor, "*stack out in"] | Any
    factors: AnyFactors
    seed: Int[Tensor, "*stack"]  # of the basis that incoming vectors are drawn from

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight, (*stack, out, in)."""
        sharding = self.factor_sharding
        if sharding is not None:
            return torch.Size((*self.factors.b.shape[:-2], sharding.rows, sharding.as_columns.rows))
        return torch.Size((*self.factors.b.shape[:-1], self.factors.a.shape[-1]))

    @property
    def factor_sharding(self) -> Sharding | None:
        """How the factors are sharded, or None if they are not sharded."""
        return self.factors.sharding if isinstance(self.factors, ShardedFactors) else None

    @property
    def alpha(self) -> float:
        """The alpha, which multiplies the product of the factors."""
        return alpha_of(self.factors)

    @property
    def divisor(self) -> float:
        """``rank / alpha``, which divides the product of the factors."""
        return divisor_of(self.factors.b.shape[-1], alpha_of(self.factors))


class Frozen(NamedTuple):
    """The frozen leaves of a `LowRank`, as `partition` returns them.

    `combine` compares `alpha` with the alpha of the factors. A step that builds new factors may lose it.
    """

    base: Float[Tensor, "*stack out in"] | Any
    seed: Int[Tensor, "*stack"]
    alpha: Alpha | tuple[()] = ()  # of the weight; () for 1
    a: Float[Tensor, "*stack rank in"] | tuple[()] = ()  # where only `b` is trained; () where both sides are


class FrozenTensor(NamedTuple):
    """A full-rank parameter that is not trained.

    `init` returns it for a parameter of a module with ``requires_grad=False``, and for integers. `partition` moves it
    into the frozen tree.
    """

    tensor: Shaped[Tensor, "..."]

    @property
    def shape(self) -> torch.Size:
        """The shape of the tensor."""
        return self.tensor.shape


class SidePlan(NamedTuple):
    """The switches of one side in one step.

    ``count`` is the same in every step, so that no step recompiles. Only entries where `active` is true are switched;
    the other entries must contain valid slots too. A plan without stack axes applies to every member of a stack.
    """

    slots: Int[Tensor, "*stack count"]  # the slots to switch, distinct where active
    indices: Int[Tensor, "*stack count"]  # the incoming vectors of the basis; taken modulo the size of a pool
    active: Bool[Tensor, "*stack count"]


class Plan(NamedTuple):
    """The switches of one weight in one step.

    `frozen_for` is the number of steps for which the counterparts are then frozen.
    """

    b: SidePlan
    a: SidePlan
    frozen_for: Int[Tensor, ""]


Param: TypeAlias = LowRank | Tensor | FrozenTensor
Params: TypeAlias = Mapping[str, Param]
Plans: TypeAlias = Mapping[str, Plan]
FrozenLeaf: TypeAlias = Frozen | FrozenTensor | Tensor
Trainable: TypeAlias = Mapping[str, AnyFactors | Tensor]
