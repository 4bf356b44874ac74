"""Deferred folds keep the weight at every moment, and give the same base once they are folded."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad
from torch.utils._pytree import tree_leaves

from dynlora_fn import Factors, LowRank, linear, materialize, merge, switch
from dynlora_fn.bases import defer, fold_pending, quantize
from dynlora_fn.bases._pending import rank_with_pending, with_pending
from dynlora_fn.optim import average
from dynlora_fn.testing import Shape, assert_same, assert_within, eps, low_rank, normal, plan_of, plans, untouched
from tests.support.strategies import quantized_params

PARAM = quantize(low_rank(Shape(8, 16, 4), base_dtype=torch.float32), "int8")


def close(got: Tensor, wanted: Tensor) -> None:
    """Compare in float64. The bound is float32's rounding of sums of some ten terms below 100."""
    torch.testing.assert_close(got.double(), wanted.double(), rtol=0, atol=1e3 * eps(torch.float32))


@given(quantized_params().flatmap(lambda param: st.tuples(st.just(param), plans(param))))
def test_what_waits_changes_no_bit_of_the_base(case):
    param, plan = case
    count = plan.b.slots.shape[-1] + plan.a.slots.shape[-1]
    waiting = defer(param, vectors=max(count, 1))
    with untouched(waiting):
        got, outgoing = switch(waiting, plan)
    assert_same(got.base.base, param.base)
    now, out = switch(param, plan)
    assert_same((got.factors, outgoing), (now.factors, out))
    wide = torch.promote_types(param.factors.a.dtype, torch.float32)
    if param.factors.a.dtype == wide:  # otherwise pending folds are rounded to the factors' dtype
        assert_same(fold_pending(got).base.base, now.base)
        assert not any(leaf.any() for leaf in fold_pending(got).base.pending)


def test_the_rank_with_pending_vectors_is_that_of_the_joined_factors():
    waiting = switch(defer(PARAM, vectors=4), plan_of(4, b=1, a=1)).param
    assert rank_with_pending(waiting) == with_pending(waiting).factors.b.shape[-1] == 4 + 4
    assert rank_with_pending(PARAM) == 4


def test_the_oldest_are_folded_where_there_is_no_room():
    plan = [plan_of(4, b=1, a=1, seed=seed) for seed in range(3)]
    waiting, weight = defer(PARAM, vectors=4), materialize(PARAM)
    for early_plan in plan[:2]:
        waiting = switch(waiting, early_plan).param
        assert_same(waiting.base.base, PARAM.base)
        close(materialize(waiting), weight)
    third = switch(waiting, plan[2]).param
    assert_same(third.base.base, fold_pending(switch(defer(PARAM, vectors=2), plan[0]).param).base.base)


@pytest.mark.parametrize("path", ["factored", "merged", "dense"])
def test_products_and_gradients_see_what_waits(path):
    waiting = switch(defer(PARAM, vectors=4), plan_of(4, b=2, a=2)).param
    x = normal(0, 5, 16)

    def loss(factors: Factors, x: Tensor, param: LowRank) -> Tensor:
        return linear(x, param._replace(factors=factors), path=path).square().sum()

    dense = waiting._replace(
        base=materialize(waiting._replace(factors=Factors(*map(torch.zeros_like, waiting.factors))))
    )
    got, wanted = (grad(loss, argnums=(0, 1))(waiting.factors, x, param) for param in (waiting, dense))
    for left, right in zip(tree_leaves(got), tree_leaves(wanted), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5 * right.abs().max().item())


def test_merging_folds_all():
    waiting = switch(defer(PARAM, vectors=4), plan_of(4, b=2, a=2)).param
    merged = merge(waiting)
    assert not merged.factors.b.any()
    assert not any(leaf.any() for leaf in merged.base.pending)
    close(materialize(merged), merged.base.base.dequantize(torch.float64))
    assert_same(merge(merged), merged)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_factors_are_not_rounded_beside_pending_ones(dtype):
    """With five slots in place of three, factors are multiplied by 5 / 3, which their dtype must not round."""
    wide = torch.float32 if dtype == torch.bfloat16 else torch.float64
    base, b, a = normal(0, 6, 8).to(wide), normal(1, 6, 3).to(dtype), normal(2, 3, 8).to(dtype)
    param = LowRank(base, Factors(b, a), torch.tensor(0))
    deferred = defer(param, vectors=2)
    for weight in (deferred, merge(deferred)):
        assert_within(materialize(weight), materialize(param), 8 * eps(wide))


def test_fewer_vectors_than_a_fold_brings_are_refused():
    with pytest.raises(ValueError, match="`vectors` = 2 of deferred 'w' is less than the 3 vectors of one fold"):
        switch({"w": defer(PARAM, vectors=2)}, {"w": plan_of(4, b=2, a=1)})
    with pytest.raises(ValueError, match="`vectors` is 0; use an integer of at least 1"):
        defer(PARAM, vectors=0)
    with pytest.raises(ValueError, match="the base of 'w' in `params` is deferred already"):
        defer({"w": defer(PARAM, vectors=2)}, vectors=2)
    with pytest.raises(ValueError, match="the base of 'w' in `params` is deferred; call `quantize` before `defer`"):
        quantize({"w": defer(PARAM, vectors=2)}, "int8")


def test_an_average_of_deferred_bases_has_their_precision():
    params = [low_rank(Shape(6, 5, 3), seed=seed, factor_dtype=torch.float32) for seed in range(2)]
    averages = [average(*pair, decay=0.5) for pair in (params, [defer(param, vectors=4) for param in params])]
    assert_same(averages[1].base.base, averages[0].base)
