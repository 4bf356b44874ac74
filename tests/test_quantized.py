"""Bases in low precision keep the weight to one quantization error, however often they are folded into."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    Shape,
    assert_same,
    assert_within,
    eps,
    low_rank,
    normal,
    plan_of,
    plans,
    seeds,
    stacks,
    untouched,
)
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import dynlora_fn as dl
from dynlora_fn import Factors, LowRank, Plan, Quantized, SidePlan, drift, merge, quantize, switch
from dynlora_fn.formats import NAMES
from dynlora_fn.opaque_codes import exact
from dynlora_fn.quantized import dequantize

RESIDUALS = ("bfloat16", "int8", None)
SHAPE = Shape(8, 16, 4)  # of a size that nf4's blocks divide
shapes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 8)).map(
    lambda sizes: Shape(8 * sizes[0], 8 * sizes[1], sizes[2])
)


@st.composite
def quantized_params(draw: st.DrawFn, residuals: tuple[str | None, ...] = RESIDUALS) -> LowRank:
    kind, residual = draw(st.sampled_from(NAMES)), draw(st.sampled_from(residuals))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    param = low_rank(draw(shapes), draw(stacks), draw(seeds), base_dtype=torch.float32, factor_dtype=dtype)
    return quantize(param, kind, residual=residual)


cases = quantized_params().flatmap(lambda param: st.tuples(st.just(param), plans(param), seeds))


def kept(base: Any) -> Tensor:
    """Codes and residual together, in float64."""
    return base.double() if isinstance(base, Tensor) else exact(base.codes, base.residual, torch.float64)


def whole(param: LowRank) -> Tensor:
    """The weight that is never lost but for the residual's own rounding."""
    b, a = (factor.double() for factor in param.factors)
    return kept(param.base) + b @ a / a.shape[-2]


def step_of(param: LowRank) -> Tensor:
    """Half a step of the base's codes at most, by the largest entry of the weight: (*stack, 1, 1)."""
    share = {"int8": 1 / 255, "float8": 2**-4, "nf4": 0.17}
    base = param.base
    kind = "plain" if isinstance(base, Tensor) else dl.formats.kind_of(base.codes)
    return kept(base).abs().amax((-2, -1), keepdim=True) * share.get(kind, eps(torch.bfloat16) / 2) * 1.01


def rounding(param: LowRank, magnitude: Tensor) -> Tensor:
    """Of codes and residual together: the residual's own, of what is at most half a step."""
    base, work = param.base, 64 * eps(torch.float32) * magnitude
    if isinstance(base, Tensor) or not tree_leaves(base.residual):
        return step_of(param) + work
    return step_of(param) * (1 / 255 if isinstance(base.residual, dl.Int8Codes) else eps(torch.bfloat16) / 2) + work


def magnitude(param: LowRank, other: LowRank) -> Tensor:
    b, a = (factor.double().abs() for factor in param.factors)
    d, c = (factor.double().abs() for factor in other.factors)
    products = (b + d) @ (a + c) / a.shape[-2]
    return (kept(param.base).abs() + products).amax((-2, -1), keepdim=True)


@given(cases)
def test_switch_keeps_the_weight(case):
    """What is kept to the rounding of the residual, what products see to one step of the codes."""
    param, plan, _ = case
    got = switch(param, plan).param
    bound = rounding(got, magnitude(param, got))
    assert_within(whole(got), whole(param), bound)
    assert_within(dequantize(got.base, torch.float64), kept(got.base), step_of(got))


@given(quantized_params())
def test_merge_keeps_the_weight_and_merging_twice_is_merging_once(param):
    with untouched(param):
        merged = merge(param)
    assert not merged.factors.b.any()
    assert_within(whole(merged), whole(param), rounding(merged, magnitude(param, merged)))
    assert_same(merge(merged), merged)


@given(cases)
def test_a_plan_without_active_entries_is_the_identity(case):
    param, plan, _ = case
    sides = [side._replace(active=torch.zeros_like(side.active)) for side in (plan.b, plan.a)]
    assert_same(switch(param, Plan(*sides, frozen_for=plan.frozen_for)).param, param)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("kind", ["int8", "float8", "bfloat16"])
def test_rows_that_a_fold_does_not_change_keep_every_bit(kind, residual):
    param = low_rank(SHAPE, (2,), base_dtype=torch.float32, factor_dtype=torch.float32)
    param.factors.b[:, ::2] = 0
    param = quantize(param, kind, residual=residual)
    if isinstance(param.base, Tensor):
        return
    got = merge(param)
    for new, old in zip(tree_leaves(got.base), tree_leaves(param.base), strict=True):
        assert_same(new[:, ::2], old[:, ::2])
    assert not torch.equal(dequantize(got.base, torch.float32)[:, 1::2], dequantize(param.base, torch.float32)[:, 1::2])


@given(cases)
def test_arguments_are_untouched_and_kinds_are_kept(case):
    param, plan, _ = case
    with untouched(param, plan):
        got = switch(param, plan).param
    for new, old in zip(tree_leaves(got), tree_leaves(param), strict=True):
        assert (new.shape, new.dtype, new.device) == (old.shape, old.dtype, old.device)


@given(quantized_params().filter(lambda param: param.seed.shape == (3,)).flatmap(lambda p: st.tuples(st.just(p), plans(p))))
def test_a_stack_is_the_loop_and_the_vmap_over_its_members(case):
    param, plan = case
    own = Plan(*(SidePlan(*(leaf.broadcast_to(3, -1) for leaf in side)) for side in (plan.b, plan.a)), plan.frozen_for)
    in_dims = (0, tree_map(lambda leaf: 0 if leaf.ndim > 1 else None, plan))
    assert_same(switch(param, plan), torch.vmap(switch, in_dims=in_dims)(param, plan))
    for number in range(3):
        one, its = (tree_map(lambda leaf: leaf[number] if leaf.ndim else leaf, tree) for tree in (param, own))  # noqa: B023
        assert_same(switch(one, its), tree_map(lambda leaf: leaf[number], switch(param, plan)))  # noqa: B023
