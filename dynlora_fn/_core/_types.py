"""The types that all packages share: weights, factors, plans and shardings.

``*stack`` means any number of leading axes. Repeated weights of one shape are stacked along these axes.
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
    """The trained low-rank factors of one weight, or of a stack of weights.

    Slot k is the pair ``b[..., :, k]``, ``a[..., k, :]``.
    """

    b: Float[Tensor, "*stack out rank"]
    a: Float[Tensor, "*stack rank in"]


@dataclass(frozen=True)
class Alpha:
    """The alpha of a weight ``base + alpha / rank * b @ a``, as in PEFT.

    It is a number and not a tensor, so it is a constant of a compiled step. It may be negative, but not 0.
    """

    value: float

    def __post_init__(self) -> None:
        value = check_number("alpha", self.value)
        if value == 0:
            raise ValueError("`alpha` is 0, so factors would not change the weight; use a number above 0")
        object.__setattr__(self, "value", float(value))


@dataclass(frozen=True)
class Sharding:
    """Which rows of a base, or of factors, this process stores.

    Every process stores `rows_per_process` rows. If the world size does not divide `rows`, the last processes store
    fewer rows, or none.
    """

    group: str  # the name of the process group
    world_size: int
    process: int  # the index of this process in the group
    rows: int  # `out` of the unsharded base
    # The fields below are for sharded factors: rows of `b` and columns of `a`.
    columns: int | None = None  # `in` of the weight; None in the sharding of a base
    weight: float = 1.0  # of this process in the mean of the gradients over processes
    alpha: float = 1.0  # of the weight

    @property
    def rows_per_process(self) -> int:
        """The largest number of rows that a process stores."""
        return -(-self.rows // self.world_size)

    @property
    def as_columns(self) -> "Sharding":
        """The sharding of the columns of `a`, written as a sharding of rows."""
        assert self.columns is not None
        return replace(self, rows=self.columns)

    @property
    def local_rows(self) -> slice:
        """The rows that this process stores."""
        first = min(self.process * self.rows_per_process, self.rows)
        return slice(first, min(first + self.rows_per_process, self.rows))


@dataclass(frozen=True)
class FixedSide:
    """The constants of a weight that trains only `b`: the size of `a`, and alpha.

    They are part of the trainable tree, which does not contain `a`.
    """

    columns: int  # `in` of the weight
    alpha: float = 1.0  # of the weight


register_constant(Alpha)  # nodes without leaves, so that the leaves of every tree are tensors
register_constant(Sharding)
register_constant(FixedSide)


class ScaledFactors(NamedTuple):
    """The factors of a weight whose alpha is not 1.

    For an alpha of 1, use `Factors`. Gradients, moments and updates have this type too, because `torch.func` and
    `tree_map` keep it. So alpha cannot differ between the forward pass, a switch and an update.
    """

    b: Float[Tensor, "*stack out rank"]
    a: Float[Tensor, "*stack rank in"]
    alpha: Alpha


class ShardedFactors(NamedTuple):
    """The shards of factors that this process stores: rows of `b` and columns of `a`.

    Gradients, moments and updates of sharded factors have this type too, because `torch.func` and `tree_map` keep it.
    So a function that combines all entries of a factor, such as a norm, can see that it has only a shard.
    """

    b: Float[Tensor, "*stack rows rank"]
    a: Float[Tensor, "*stack rank columns"]
    sharding: Sharding  # its `columns` is not None


class OneSidedFactors(NamedTuple):
    """The factors of a weight that trains only `b`.

    The rows of `a` are orthogonal, and each has the norm ``sqrt(rank / |alpha|)``. They come from the basis seed, and
    only a switch replaces them. `partition` moves `a` into the frozen tree and leaves ``()`` in its place. So
    gradients, moments and updates have one tensor.
    """

    b: Float[Tensor, "*stack out rank"]
    a: Any  # (*stack, rank, in), or () in the trainable tree and in what mirrors it
    fixed: FixedSide


AnyFactors: TypeAlias = Factors | ScaledFactors | ShardedFactors | OneSidedFactors


def is_factors(leaf: Any) -> TypeGuard[AnyFactors]:
    """Return whether a leaf of the trainable tree is a tuple of factors.

    Factors may be sharded, have an alpha, or have only one trained side.
    """
    return isinstance(leaf, Factors | ScaledFactors | ShardedFactors | OneSidedFactors)


def sides_of(factors: AnyFactors) -> tuple[Any, ...]:
    """Return `b` and `a`, or only `b` if `a` is not in these factors."""
    return (factors.b,) if isinstance(factors.a, tuple) and not factors.a else (factors.b, factors.a)


def with_sides(factors: AnyFactors, sides: Sequence[Any]) -> Any:
    """Replace the sides of factors. Pass as many sides as `sides_of` returns."""
    return factors._replace(b=sides[0]) if len(sides) == 1 else factors._replace(b=sides[0], a=sides[1])


def alpha_of(factors: AnyFactors) -> float:
    """Return the alpha of the weight that factors or their gradients belong to."""
    if isinstance(factors, Factors):
        return 1.0
    if isinstance(factors, OneSidedFactors):
        return factors.fixed.alpha
    return factors.alpha.value if isinstance(factors, ScaledFactors) else factors.sharding.alpha


def with_alpha(factors: Factors, alpha: float) -> Factors | ScaledFactors:
    """Return factors with an alpha: `Factors` for 1, and `ScaledFactors` otherwise."""
    return factors if alpha == 1 else ScaledFactors(factors.b, factors.a, Alpha(alpha))


def divisor_of(rank: int, alpha: float) -> float:
    """Return ``rank / alpha``: the weight is ``base + b @ a / divisor``.

    For an alpha of 1 this is the integer `rank`, so bits and graphs are the same as for a division by the rank.
    """
    return rank if alpha == 1 else rank / alpha


class LowRank(NamedTuple):
    """A low-rank weight, ``base + alpha / rank * b @ a``.

    This is equation 1 of arXiv:2406.06564. Alpha is 1 for `Factors`, and a field of the other types of factors. All
    functions read it there, so the forward pass and a switch cannot disagree about it.
    """

    # A plain tensor or a tuple of `dynlora_fn.bases`. Only transforms such as `switch` and `merge` change it.
    base: Float[Tensor, "*stack out in"] | Any
    factors: AnyFactors
    seed: Int[Tensor, "*stack"]  # of the basis from which incoming vectors are generated

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight, (*stack, out, in)."""
        factors = self.factors
        if isinstance(factors, ShardedFactors):
            sharding = factors.sharding
            return torch.Size((*factors.b.shape[:-2], sharding.rows, sharding.as_columns.rows))
        return torch.Size((*factors.b.shape[:-1], factors.a.shape[-1]))

    @property
    def factor_sharding(self) -> Sharding | None:
        """How the factors are sharded, or None if they are not sharded."""
        return self.factors.sharding if isinstance(self.factors, ShardedFactors) else None

    @property
    def alpha(self) -> float:
        """The alpha in ``base + alpha / rank * b @ a``."""
        return alpha_of(self.factors)

    @property
    def divisor(self) -> float:
        """``rank / alpha``: the weight is ``base + b @ a / divisor``."""
        return divisor_of(self.factors.b.shape[-1], alpha_of(self.factors))


def has_no_constants(param: LowRank) -> bool:
    """Return whether a weight has no constants.

    Dynamo cannot pass constants to a function in the graph.
    """
    return isinstance(param.base, Tensor) and isinstance(param.factors, Factors)


class Frozen(NamedTuple):
    """The frozen leaves of a `LowRank`, as `partition` returns them.

    `combine` compares `alpha` with the alpha of the factors, since a step that builds new `Factors` would drop it.
    """

    base: Float[Tensor, "*stack out in"] | Any
    seed: Int[Tensor, "*stack"]
    alpha: Alpha | tuple[()] = ()  # () means 1, or the alpha of sharded factors
    a: Float[Tensor, "*stack rank in"] | tuple[()] = ()  # `a` of a weight that trains only `b`; () for other weights


class FrozenTensor(NamedTuple):
    """A full-rank parameter that is not trained.

    `init` returns it for a parameter of a module that has ``requires_grad=False`` or an integer dtype. `partition`
    moves it into the frozen tree.
    """

    tensor: Shaped[Tensor, "..."]

    @property
    def shape(self) -> torch.Size:
        """The shape of the tensor."""
        return self.tensor.shape


class SidePlan(NamedTuple):
    """The switches of one side in one step.

    Only entries with `active` true are switched. `count` is the same in every step, so a compiled step is not compiled
    again; inactive entries fill it up and must contain valid slots too. A plan without stack axes applies to every
    member of a stack. The stack axes of the three tensors are broadcast.
    """

    slots: Int[Tensor, "*#stack count"]  # the slots to switch, distinct where active
    indices: Int[Tensor, "*#stack count"]  # of the incoming vectors in the basis; modulo the size of a pool
    active: Bool[Tensor, "*#stack count"]


class Plan(NamedTuple):
    """The switches of one weight in one step.

    After a switch, the optimizer freezes the counterparts of the switched vectors for `frozen_for` steps.
    """

    b: SidePlan
    a: SidePlan
    frozen_for: Int[Tensor, ""]


Param: TypeAlias = LowRank | Tensor | FrozenTensor
Params: TypeAlias = Mapping[str, Param]
Plans: TypeAlias = Mapping[str, Plan]
FrozenLeaf: TypeAlias = Frozen | FrozenTensor | Tensor
Trainable: TypeAlias = Mapping[str, AnyFactors | Tensor]
