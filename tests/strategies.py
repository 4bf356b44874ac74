"""Hypothesis strategies for every valid value, edges included, and the trees of tensors that the tests compare.

Only integers are drawn, and every tensor is a function of them: so that examples can be repeated and shrink.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

from dynlora_fn import Factors, LowRank, Plan, SidePlan

seeds = st.integers(0, 2**31 - 1)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])
stacks = st.sampled_from([(), (1,), (3,), (2, 3)])


class Shape(NamedTuple):
    out_features: int
    in_features: int
    rank: int


@st.composite
def shapes(draw: st.DrawFn, largest: int = 8) -> Shape:
    """Matrices of any proportion with any rank that fits them, 1 and min(out, in) among them."""
    out_features, in_features = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    least = min(out_features, in_features)
    return Shape(out_features, in_features, draw(st.one_of(st.just(1), st.just(least), st.integers(1, least))))


any_shapes = shapes()


@st.composite
def low_rank_params(
    draw: st.DrawFn,
    *,
    shapes: st.SearchStrategy[Shape] = any_shapes,
    stacks: st.SearchStrategy[tuple[int, ...]] = stacks,
    base_dtypes: st.SearchStrategy[torch.dtype] = dtypes,
    factor_dtypes: st.SearchStrategy[torch.dtype] = dtypes,
) -> LowRank:
    shape, stack, seed = draw(shapes), draw(stacks), draw(seeds)
    return low_rank(shape, stack, seed, base_dtype=draw(base_dtypes), factor_dtype=draw(factor_dtypes))


def low_rank(
    shape: Shape,
    stack: tuple[int, ...] = (),
    seed: int = 0,
    *,
    base_dtype: torch.dtype = torch.float64,
    factor_dtype: torch.dtype = torch.float64,
) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    out_features, in_features, rank = shape
    return LowRank(
        normal(generator, *stack, out_features, in_features, dtype=base_dtype),
        Factors(
            b=normal(generator, *stack, out_features, rank, dtype=factor_dtype),
            a=normal(generator, *stack, rank, in_features, dtype=factor_dtype),
        ),
        torch.randint(2**62, stack, generator=generator),
    )


@st.composite
def plans(draw: st.DrawFn, param: LowRank) -> Plan:
    """Any plan for `param`: none, some or all of the slots of each side, whole or in part inactive, one plan for the
    whole stack or one for each member, the same slots on both sides or not."""
    rank, stack = param.factors.a.shape[-2], tuple(param.seed.shape)
    b = draw(_side_plans(rank, stack))
    a = draw(st.one_of(st.just(b), _side_plans(rank, stack)))
    return Plan(b=b, a=a, frozen_for=torch.tensor(draw(st.integers(0, 6)), dtype=torch.int32))


@st.composite
def _side_plans(draw: st.DrawFn, rank: int, stack: tuple[int, ...]) -> SidePlan:
    count = draw(st.one_of(st.just(0), st.just(rank), st.integers(0, rank)))
    own_stack = draw(st.sampled_from([stack, ()]))
    share_active = draw(st.sampled_from([1.0, 0.5, 0.0]))
    return side_plan(rank, count, own_stack, draw(seeds), share_active=share_active)


def side_plan(
    rank: int, count: int, stack: tuple[int, ...] = (), seed: int = 0, *, share_active: float = 1.0
) -> SidePlan:
    generator = torch.Generator().manual_seed(seed)
    # The order of random numbers is a permutation: distinct slots, drawn anew for each member of the stack.
    slots = torch.rand(*stack, rank, generator=generator).argsort(dim=-1)[..., :count]
    indices = torch.randint(2**34, (*stack, count), generator=generator)
    return SidePlan(slots, indices, torch.rand(*stack, count, generator=generator) < share_active)


def plan_of(rank: int, *, b: int, a: int, stack: tuple[int, ...] = (), seed: int = 0, frozen_for: int = 5) -> Plan:
    """A plan of so many active vectors of each side."""
    sides = side_plan(rank, b, stack, seed), side_plan(rank, a, stack, seed + 1)
    return Plan(*sides, frozen_for=torch.tensor(frozen_for, dtype=torch.int32))


def normal(seed: int | torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_same(got: Any, wanted: Any) -> None:
    """Two trees agree in structure, shapes, dtypes, devices and in every bit."""
    got_leaves, got_structure = tree_flatten_with_path(got)
    wanted_leaves, structure = tree_flatten_with_path(wanted)
    assert got_structure == structure
    for (path, left), (_, right) in zip(got_leaves, wanted_leaves, strict=True):
        if isinstance(right, Tensor):
            assert _kind(left) == _kind(right), keystr(path)
            assert torch.equal(_bits(left), _bits(right)), f"{keystr(path)}: {left} is not {right}"
        else:
            assert left == right, keystr(path)


def assert_within(got: Tensor, wanted: Tensor, bound: Tensor | float) -> None:
    """Every entry of `got` is as near to `wanted` as the rounding errors that `bound` adds up, compared in float64."""
    error = (got.double() - wanted.double()).abs()
    assert error.shape == wanted.shape
    assert (error <= bound).all(), f"off by up to {error.max():.2e}, {(error / bound).max():.3g} times the bound"


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _kind(leaf: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return leaf.shape, leaf.dtype, leaf.device


def _bits(leaf: Tensor) -> Tensor:
    return leaf.detach().contiguous().flatten().view(torch.uint8)


@contextmanager
def untouched(*trees: Any) -> Iterator[None]:
    """The tensors of the trees hold the same values afterwards, and nobody wrote into them in between."""
    leaves = [leaf for _, leaf in tree_flatten_with_path(trees)[0] if isinstance(leaf, Tensor)]
    before = [(leaf._version, leaf.requires_grad, leaf.detach().clone()) for leaf in leaves]
    yield
    for leaf, (version, requires_grad, value) in zip(leaves, before, strict=True):
        assert leaf._version == version
        assert leaf.requires_grad == requires_grad
        assert_same(leaf, value)
