"""The tuples everything here is made of.

``*stack`` stands for any number of leading axes: weights of one shape that repeat over layers live in one tuple.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias

from jaxtyping import Bool, Float, Int
from torch import Tensor

Side: TypeAlias = Literal["b", "a"]


class Factors(NamedTuple):
    """The trained low-rank factors of one weight. Slot k is the pair ``b[..., :, k]``, ``a[..., k, :]``."""

    b: Float[Tensor, "*stack out rank"]
    a: Float[Tensor, "*stack rank in"]


class LowRank(NamedTuple):
    """One weight, ``base + b @ a / rank`` (arXiv:2406.06564, eq. 1 with alpha = 1).

    The scale is always ``1 / rank``, so that the forward pass and a switch cannot disagree about it.
    """

    base: Float[Tensor, "*stack out in"]  # frozen: changed by `switch` and `merge` alone, never by a gradient
    factors: Factors
    seed: Int[Tensor, "*stack"]  # names the basis that incoming vectors are drawn from


class Frozen(NamedTuple):
    """What `partition` keeps of a `LowRank` out of the gradient's reach."""

    base: Float[Tensor, "*stack out in"]
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
