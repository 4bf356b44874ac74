"""Switches, merges and vectors of weights that train only `b`."""

from itertools import pairwise
from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

import dynlora_fn as dl
from dynlora_fn import materialize, merge, switch
from dynlora_fn.bases import defer, fold_pending
from dynlora_fn.interop import resize
from dynlora_fn.schedules import Schedule, dithered, every
from dynlora_fn.switching import BasisSlice, basis_vectors, candidates, init_pool
from dynlora_fn.testing import (
    Shape,
    TransformMachine,
    assert_same,
    check_compiles,
    check_keeps_structure,
    check_preserves_weight,
    check_vmap,
    low_rank,
    low_rank_params,
    plan_of,
    plans,
    shapes,
)

ALPHAS = st.sampled_from([1.0, 0.3, -2.0])
ONE_SIDED = low_rank_params(alphas=ALPHAS, trained="b")
WITH_PLAN = ONE_SIDED.flatmap(lambda param: st.tuples(st.just(param), plans(param)))
FLOAT32 = low_rank_params(alphas=ALPHAS, trained="b", factor_dtypes=st.just(torch.float32))


def error(param):
    """Return how far the rows of `a` are from orthogonal ones of the same length, relative to its square."""
    a, rank = param.factors.a.double(), param.factors.b.shape[-1]
    return float((a @ a.mT * abs(param.alpha) / rank - torch.eye(rank)).abs().max())


def test_a_switch_keeps_the_weight():
    check_preserves_weight(switch, exact_factors=True, arguments=WITH_PLAN)
    check_keeps_structure(switch, arguments=WITH_PLAN)


@pytest.mark.parametrize("transform", [merge, fold_pending, lambda param: dl.decay(param, 0.0)])
def test_transforms_keep_the_weight(transform):
    check_preserves_weight(transform, exact_factors=True, arguments=st.tuples(ONE_SIDED))


def test_a_resize_keeps_the_weight_and_the_rows_orthogonal():
    for rank in (1, 4):
        check_preserves_weight(
            lambda param, rank=rank: resize({"w": param}, rank=rank).params["w"],
            exact_factors=True,
            arguments=st.tuples(low_rank_params(shapes=st.just(Shape(6, 5, 2)), trained="b")),
        )
    assert error(resize({"w": low_rank(Shape(8, 9, 2), trained="b")}, rank=5).params["w"]) < 1e-12


def test_stacks_and_compiled_switches_are_as_with_both_sides():
    stacks = low_rank_params(alphas=ALPHAS, stacks=st.just((3,)), trained="b")
    check_vmap(merge, arguments=st.tuples(stacks), examples=20)
    check_compiles(switch, arguments=WITH_PLAN, examples=2)


@given(FLOAT32.flatmap(lambda param: st.tuples(st.just(param), st.lists(plans(param), max_size=5))))
def test_any_plans_keep_the_rows_orthogonal(param_and_plans):
    param, switched = param_and_plans
    for plan in switched:
        param = switch(param, plan).param
    assert error(param) < 1e-6


@pytest.mark.parametrize("shape", [Shape(8, 8, 2), Shape(12, 8, 5), Shape(6, 9, 6)])
def test_the_rows_stay_orthogonal_through_100_switches(shape):
    param = low_rank(shape, factor_dtype=torch.float32, trained="b")
    weight, schedule = materialize(param), Schedule(interval=10)
    for step in range(100):
        param = switch({"w": param}, schedule(step, {"w": param})).params["w"]
    assert error(param) < 1e-6
    torch.testing.assert_close(materialize(param), weight, atol=1e-5, rtol=1e-5)


@given(shapes(largest=9), st.integers(0, 2**31))
def test_all_rows_of_a_basis_are_orthogonal(shape, seed):
    indices = torch.arange(shape.in_features)
    slices = BasisSlice(torch.tensor(seed), indices[:0], indices, shape[:2], 1, "orthonormal", torch.float64)
    (vectors,) = basis_vectors([slices])
    torch.testing.assert_close(vectors.a @ vectors.a.mT, torch.eye(shape.in_features, dtype=torch.float64))
    assert_same(basis_vectors([slices._replace(a_indices=indices + 3 * shape.in_features)]), [vectors])


def test_other_seeds_have_other_spans():
    one, two = (low_rank(Shape(64, 64, 16), seed=seed, trained="b").factors.a / 4 for seed in (0, 1))
    assert 0.1 < float((one @ two.mT).square().sum() / 16) < 0.5  # a quarter for random spans


def test_both_sides_of_a_slot_are_switched_together_and_enter_as_zeros():
    param = low_rank(Shape(8, 8, 4), trained="b")
    plan = Schedule(interval=4, freeze=2)(0, {"w": param})["w"]
    assert_same(plan.b.slots, plan.a.slots)
    assert_same(plan.b.active, plan.a.active)
    new = switch(param, plan).param
    slots = plan.a.slots[plan.a.active]
    assert len(slots)
    assert not new.factors.b[:, slots].any()
    assert not torch.equal(new.factors.a[slots], param.factors.a[slots])


def test_both_sides_of_a_slot_are_switched_together_at_a_rate():
    param, schedule = low_rank(Shape(16, 16, 4), trained="b"), Schedule(interval=10)
    plans = [schedule(step, {"w": param})["w"] for step in range(30)]
    for plan in plans:
        assert_same(plan.b, plan.a)
    assert sum(int(plan.b.active.sum()) for plan in plans) == 12  # rank * steps / interval


def test_every_row_of_the_basis_comes_in_turn():
    params, schedule = {"w": low_rank(Shape(8, 8, 2), trained="b")}, every(1)
    first = params["w"].factors.a
    spans = [first]
    for step in range(4):
        params = switch(params, schedule(step, params)).params
        spans.append(params["w"].factors.a)
    for one, two in pairwise(spans):
        torch.testing.assert_close(one @ two.mT, torch.zeros(2, 2, dtype=torch.float64))
    torch.testing.assert_close(spans[4], first)


def test_a_plan_without_side_b_keeps_the_columns():
    param = low_rank(Shape(6, 6, 3), trained="b")
    new = switch(param, plan_of(3, b=0, a=2)).param
    assert_same(new.factors.b, param.factors.b)
    torch.testing.assert_close(materialize(new), materialize(param))


def test_switches_are_counted_and_dithered_plans_keep_the_weight():
    params = {"w": low_rank(Shape(8, 8, 4), trained="b")}
    schedule = Schedule(interval=10)
    for step in range(12):
        plan = schedule(step, params)["w"]
        assert schedule.switches(step, params) == int(plan.a.active.sum() + plan.b.active.sum())
    dither = dithered(schedule, params, total_steps=20, seed=0)
    for step in range(20):
        new = switch(params, dither(step, params)).params
        torch.testing.assert_close(materialize(new)["w"], materialize(params)["w"])
        params = new
    assert error(params["w"]) < 1e-12


def test_passed_vectors_must_be_orthogonal():
    param = low_rank(Shape(6, 6, 3), trained="b")
    plan = plan_of(3, b=2, a=2)
    assert_same(switch(param, plan, incoming=candidates(param, plan)), switch(param, plan))
    new, outgoing = switch(param, plan)
    assert_same(switch(new, plan, incoming=outgoing).param.factors, param.factors)
    other = dl.Factors(outgoing.b, 1.1 * outgoing.a)
    with pytest.raises(ValueError, match=f"length {sqrt(3):.6g}"):
        switch(param, plan, incoming=other)
    with pytest.raises(ValueError, match="'w'"):
        switch({"w": param}, {"w": plan}, incoming={"w": dl.Factors(outgoing.b, outgoing.a.flip(-2) + outgoing.a)})


@pytest.mark.parametrize("alpha", [1.0, 3.0, -0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_candidates_are_orthogonal_for_every_alpha(dtype, alpha):
    for shape in (Shape(6, 6, 2), Shape(4, 1024, 4)):
        param = low_rank(shape, trained="b", factor_dtype=dtype, alpha=alpha)
        plan = every(1)(1, {"w": param})["w"]
        assert_same(switch(param, plan, incoming=candidates(param, plan)), switch(param, plan))


def test_a_pool_is_refused_by_name():
    with pytest.raises(ValueError, match="'w'"):
        init_pool({"w": low_rank(Shape(6, 6, 3), trained="b")})


def test_pending_vectors_are_folded():
    param = defer(low_rank(Shape(6, 6, 3), trained="b"), vectors=4)
    new = switch(param, plan_of(3, b=2, a=2)).param
    torch.testing.assert_close(materialize(new), materialize(param))
    torch.testing.assert_close(materialize(fold_pending(new)), materialize(param))


def test_transforms_in_any_order_keep_the_weights():
    class OneSided(TransformMachine):
        trained = ("b",)
        alphas = (1.0, 0.3)

    run_state_machine_as_test(OneSided, settings=settings(max_examples=8, stateful_step_count=12, deadline=None))
