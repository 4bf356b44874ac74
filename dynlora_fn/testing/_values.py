"""Weights, plans and states as functions of a few integers: examples repeat, and their calls say all about them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynlora_fn._core._torch import tree_map
from dynlora_fn._core._tree import partition
from dynlora_fn._core._types import Factors, LowRank, Params, Plan, SidePlan, Trainable
from dynlora_fn.bases._deferred import defer
from dynlora_fn.bases._quantize import quantize
from dynlora_fn.bases._quantized import ResidualKind
from dynlora_fn.optim._adamw import adamw
from dynlora_fn.optim._transform import Transform


class Shape(NamedTuple):
    """Of one low-rank weight."""

    out_features: int
    in_features: int
    rank: int


class Storage(NamedTuple):
    """How a base is held: "float64" or "float32" as they are, or a format of `quantize`."""

    kind: str
    residual: ResidualKind = None


PLAIN = (Storage("float64"), Storage("float32"), Storage("bfloat16"))
RESIDUALS: tuple[ResidualKind, ...] = ("bfloat16", "int8", None)
STORAGES = (
    *PLAIN,
    Storage("bfloat16", "bfloat16"),
    Storage("bfloat16", "int8"),
    *(
        Storage(kind, residual)
        for kind in ("int8", "float8", "nf4", "mxfp4", "nvfp4")
        for residual in (None, "int8", "bfloat16")
    ),
)


def fits(storage: Storage, shape: Shape) -> bool:
    """Whether the format's blocks divide a weight of the shape."""
    out_features, in_features, _ = shape
    if storage.kind == "nf4":
        return out_features * in_features % 64 == 0 and in_features % 2 == 0
    return in_features % {"nvfp4": 16, "mxfp4": 32}.get(storage.kind, 1) == 0


def normal(seed: int | torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers of a normal distribution, drawn in float64 and rounded once."""
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
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
) -> LowRank:
    """A weight whose base, factors and basis seeds are drawn from one generator.

    Args:
        shape, stack: of the weight.
        seed: of the generator.
        base_dtype: of a base that is held as it is.
        factor_dtype: of the factors.
        storage: how the base is held instead.
        waiting: vectors whose fold waits, as after `defer`; none unless given.

    Example:
        >>> low_rank(Shape(6, 4, 2), (3,), seed=1).factors.b.shape
        torch.Size([3, 6, 2])
    """
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
    param = LowRank(base, factors(rank), torch.randint(2**62, stack, generator=generator))
    if storage is not None and storage.kind not in ("float64", "float32"):
        param = quantize(param, storage.kind, residual=storage.residual)
    if waiting:
        param = defer(param, vectors=waiting)
        param = param._replace(base=param.base._replace(pending=factors(waiting)))  # type: ignore
    return param


def side_plan(
    rank: int, count: int, stack: tuple[int, ...] = (), seed: int = 0, *, share_active: float = 1.0
) -> SidePlan:
    """`count` distinct slots, of which about a share is active, with vectors from anywhere in the basis."""
    generator = torch.Generator().manual_seed(seed)
    # The order of random numbers is a permutation: distinct slots, drawn anew for each member of the stack.
    slots = torch.rand(*stack, rank, generator=generator).argsort(dim=-1)[..., :count]
    indices = torch.randint(2**34, (*stack, count), generator=generator)
    return SidePlan(slots, indices, torch.rand(*stack, count, generator=generator) < share_active)


def plan_of(rank: int, *, b: int, a: int, stack: tuple[int, ...] = (), seed: int = 0, frozen_for: int = 5) -> Plan:
    """A plan of so many active vectors of each side."""
    sides = side_plan(rank, b, stack, seed), side_plan(rank, a, stack, seed + 1)
    return Plan(*sides, frozen_for=torch.tensor(frozen_for, dtype=torch.int32))


def optimizer_state(
    params: Params | Trainable, *, steps: int, seed: int = 0, optimizer: Transform | None = None
) -> Any:
    """The state after so many updates with random gradients; where vectors can be frozen, some are.

    Args:
        params: all of them, or what is trained.
        steps: 0 is the state that the optimizer starts with.
        seed: of gradients and freezes.
        optimizer: `adamw()` unless given.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = adamw() if optimizer is None else optimizer
    trainable = partition(params).trainable if any(isinstance(leaf, LowRank) for leaf in params.values()) else params  # type: ignore
    state = optimizer.init(trainable)
    for _ in range(steps):
        grads = tree_map(lambda leaf: normal(generator, *leaf.shape, dtype=leaf.dtype), dict(trainable))
        _, state = optimizer.update(grads, state, trainable, lr=0.1)
    if steps and hasattr(state, "frozen_for"):
        frozen = tree_map(lambda leaf: torch.randint_like(leaf, 7, generator=generator), state.frozen_for)
        state = state._replace(frozen_for=frozen)
    return state
