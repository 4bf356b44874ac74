"""Create weights, plans and states from a few integers.

The integers describe an example completely, so it can be repeated.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dynlora_fn._core._check import check_choice, check_integer, check_number
from dynlora_fn._core._torch import tree_map
from dynlora_fn._core._tree import partition
from dynlora_fn._core._types import (
    Factors,
    FixedSide,
    LowRank,
    OneSidedFactors,
    Params,
    Plan,
    SidePlan,
    Trainable,
    with_alpha,
)
from dynlora_fn.bases._defer import defer
from dynlora_fn.bases._formats import FORMATS
from dynlora_fn.bases._quantize import quantize
from dynlora_fn.bases._residual import ResidualKind
from dynlora_fn.optim._adamw import adamw
from dynlora_fn.optim._freeze import FreezeState
from dynlora_fn.optim._transform import Transform
from dynlora_fn.switching._weight import first_vectors


class Shape(NamedTuple):
    """The shape of one low-rank weight."""

    out_features: int
    in_features: int
    rank: int


class Storage(NamedTuple):
    """The storage of a base.

    `kind` is "float64" or "float32" for a plain tensor, or a format of `quantize`.
    """

    kind: str
    residual: ResidualKind = None


PLAIN = (Storage("float64"), Storage("float32"), Storage("bfloat16"))
RESIDUALS: tuple[ResidualKind, ...] = ("bfloat16", "int8", None)
STORAGES = (
    *PLAIN,
    Storage("bfloat16", "bfloat16"),
    Storage("bfloat16", "int8"),
    *(Storage(kind, residual) for kind in FORMATS if kind != "bfloat16" for residual in (None, "int8", "bfloat16")),
)


def fits(storage: Storage, shape: Shape) -> bool:
    """Return whether the blocks of a format divide a weight of this shape."""
    if storage.kind not in FORMATS:
        return True
    try:
        FORMATS[storage.kind].empty("weight", torch.empty(shape.out_features, shape.in_features, device="meta"))
    except ValueError:
        return False
    return True


def normal(seed: int | torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return normally distributed numbers, drawn in float64 and rounded once.

    Args:
        seed: The seed, or a generator to draw from.
        *shape: The shape of the tensor.
        dtype: The dtype to round to.

    Returns:
        A tensor on the CPU. Equal arguments give equal bits.

    Example:
        >>> import torch
        >>> normal(0, 2, 3, dtype=torch.float32).shape
        torch.Size([2, 3])
    """
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(int(seed))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def low_rank(
    shape: Shape,
    stack: tuple[int, ...] = (),
    seed: int = 0,
    *,
    base_dtype: torch.dtype = torch.float64,
    factor_dtype: torch.dtype = torch.float64,
    storage: Storage | None = None,
    waiting: int = 0,
    alpha: float = 1.0,
    trained: Literal["both", "b"] = "both",
) -> LowRank:
    """Return a weight with a random base, random factors and random basis seeds.

    Args:
        shape: The shape of the weight and the rank.
        stack: The stack axes.
        seed: The seed of the generator. Equal arguments give equal bits.
        base_dtype: The dtype of a base that is a plain tensor.
        factor_dtype: The dtype of the factors.
        storage: The storage of the base. Default None means a plain tensor of `base_dtype`.
        waiting: The number of vectors with a pending fold. With 0 the base is not deferred.
        alpha: The alpha of the weight.
        trained: The factors that are trained, "both" or only "b". With "b" the rows of `a` are the first of the basis.

    Returns:
        The weight, on the CPU.

    Raises:
        TypeError: If `waiting` is not an integer, or `alpha` is not a number.
        ValueError: If `trained` is unknown, `waiting` is negative, or `alpha` is 0 or not finite.

    Example:
        >>> low_rank(Shape(6, 4, 2), (3,), seed=1).factors.b.shape
        torch.Size([3, 6, 2])
    """
    check_choice("trained", trained, ("both", "b"))
    if storage is not None:
        base_dtype = torch.float64 if storage.kind == "float64" else torch.float32
    generator = torch.Generator().manual_seed(seed)
    out_features, in_features, rank = shape

    def factors(count: int) -> Factors:
        return Factors(
            b=normal(generator, *stack, out_features, count, dtype=factor_dtype),
            a=normal(generator, *stack, count, in_features, dtype=factor_dtype),
        )

    base = normal(generator, *stack, out_features, in_features, dtype=base_dtype)
    param = LowRank(base, with_alpha(factors(rank), alpha), torch.randint(2**62, stack, generator=generator))
    if trained == "b":
        a = first_vectors(param.seed, (out_features, in_features), rank, "orthonormal", factor_dtype, alpha=alpha).a
        param = param._replace(factors=OneSidedFactors(param.factors.b, a, FixedSide(in_features, alpha)))
    if storage is not None and storage.kind not in ("float64", "float32"):
        param = quantize(param, storage.kind, residual=storage.residual)
    if waiting:
        param = defer(param, vectors=waiting)
        param = param._replace(base=param.base._replace(pending=factors(waiting)))  # type: ignore
    return param


def side_plan(
    rank: int, count: int, stack: tuple[int, ...] = (), seed: int = 0, *, share_active: float = 1.0
) -> SidePlan:
    """Return a side plan of `count` distinct slots and random vectors of the basis.

    Args:
        rank: The rank of the weight.
        count: The number of entries, at most `rank`.
        stack: The stack axes. Default () means one plan for the whole stack.
        seed: The seed of the generator.
        share_active: The probability that an entry is active.

    Returns:
        The side plan, on the CPU.

    Raises:
        ValueError: If `count` is above `rank`, or `share_active` is not from 0 to 1.

    Example:
        >>> side_plan(4, 2).slots.shape
        torch.Size([2])
    """
    share_active = check_number("share_active", share_active, least=0, most=1)
    if count > rank:
        raise ValueError(f"`count` is {count}, but rank {rank} has only {rank} slots; use fewer")
    generator = torch.Generator().manual_seed(seed)
    # The order of random numbers is a permutation, so slots are distinct. Each member of the stack has another order.
    slots = torch.rand(*stack, rank, generator=generator).argsort(dim=-1)[..., :count]
    indices = torch.randint(2**34, (*stack, count), generator=generator)
    return SidePlan(slots, indices, torch.rand(*stack, count, generator=generator) < share_active)


def plan_of(rank: int, *, b: int, a: int, stack: tuple[int, ...] = (), seed: int = 0, frozen_for: int = 5) -> Plan:
    """Return a plan with `b` and `a` active vectors on the two sides.

    Args:
        rank: The rank of the weight.
        b: The number of vectors to switch on side b.
        a: The number of vectors to switch on side a.
        stack: The stack axes. Default () means one plan for the whole stack.
        seed: The seed of the generator.
        frozen_for: The number of updates for which the counterparts are frozen.

    Returns:
        The plan, on the CPU.

    Example:
        >>> plan_of(4, b=1, a=2).a.active
        tensor([True, True])
    """
    sides = side_plan(rank, b, stack, seed), side_plan(rank, a, stack, seed + 1)
    return Plan(*sides, frozen_for=torch.tensor(frozen_for, dtype=torch.int32))


def optimizer_state(
    params: Params | Trainable, *, steps: int, seed: int = 0, optimizer: Transform | None = None
) -> Any:
    """Return the state of an optimizer after updates with random gradients.

    If the optimizer can freeze vectors, some vectors are frozen.

    Args:
        params: The parameters, or only the trainable tree.
        steps: The number of updates. 0 returns the initial state.
        seed: The seed of gradients and freezes.
        optimizer: The optimizer. Default None means `adamw()`.

    Returns:
        The state of the optimizer.

    Example:
        >>> optimizer_state({"w": low_rank(Shape(6, 4, 2))}, steps=1).inner.mu["w"].b.shape
        torch.Size([6, 2])
    """
    steps = check_integer("steps", steps, least=0)
    generator = torch.Generator().manual_seed(seed)
    optimizer = adamw() if optimizer is None else optimizer
    trainable = partition(params).trainable if any(isinstance(leaf, LowRank) for leaf in params.values()) else params  # type: ignore
    state = optimizer.init(trainable)
    for _ in range(steps):
        grads = tree_map(lambda leaf: normal(generator, *leaf.shape, dtype=leaf.dtype), dict(trainable))
        _, state = optimizer.update(grads, state, trainable, lr=0.1)

    def freeze(node: Any) -> Any:
        if not isinstance(node, FreezeState):
            return node
        return node._replace(
            frozen_for=tree_map(lambda leaf: torch.randint_like(leaf, 7, generator=generator), node.frozen_for)
        )

    return tree_map(freeze, state, is_leaf=lambda node: isinstance(node, FreezeState)) if steps else state
