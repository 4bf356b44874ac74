"""Switches, merges and vectors of weights with an alpha."""

from math import sqrt

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

import dynlora_fn as dl
from dynlora_fn import Factors, init, materialize, merge, switch
from dynlora_fn.bases import defer, drift, fold_pending, quantize, to_torchao
from dynlora_fn.interop import resize
from dynlora_fn.switching import basis_bounds, fold, init_pool
from dynlora_fn.testing import (
    Shape,
    Storage,
    TransformMachine,
    assert_same,
    check_compiles,
    check_keeps_structure,
    check_preserves_weight,
    check_vmap,
    low_rank,
    low_rank_params,
    normal,
    plans,
)

ALPHAS = st.sampled_from([4.0, 0.3, -2.0])
WITH_PLAN = low_rank_params(alphas=ALPHAS).flatmap(lambda param: st.tuples(st.just(param), plans(param)))


def test_a_switch_keeps_the_weight():
    check_preserves_weight(switch, exact_factors=True, arguments=WITH_PLAN)
    check_keeps_structure(switch, arguments=WITH_PLAN)


@pytest.mark.parametrize("transform", [merge, fold_pending, lambda param: dl.decay(param, 0.0)])
def test_transforms_keep_the_weight(transform):
    check_preserves_weight(transform, exact_factors=True, arguments=st.tuples(low_rank_params(alphas=ALPHAS)))


def test_a_resize_keeps_the_weight():
    def smaller(param):
        return resize({"w": param}, rank=max(1, param.factors.b.shape[-1] // 2)).params["w"]

    def larger(param):
        return resize({"w": param}, rank=min(param.shape[-2:])).params["w"]

    for transform in (smaller, larger):
        check_preserves_weight(transform, exact_factors=True, arguments=st.tuples(low_rank_params(alphas=ALPHAS)))


def test_stacks_and_compiled_switches_are_as_for_an_alpha_of_one():
    stacks = low_rank_params(alphas=ALPHAS, stacks=st.just((3,)))
    check_vmap(merge, arguments=st.tuples(stacks), examples=20)
    check_compiles(switch, arguments=WITH_PLAN, examples=2)


class WithAlpha(TransformMachine):
    alphas = (4.0, 0.3)


def test_transforms_in_any_order_keep_the_weights():
    run_state_machine_as_test(WithAlpha, settings=settings(max_examples=10, stateful_step_count=12, deadline=None))


@pytest.mark.parametrize("alpha", [1, 4.0, 0.3])
def test_products_of_the_basis_are_of_the_same_size_for_every_alpha(alpha):
    bounds, plain = basis_bounds(6, 4, 2, alpha=alpha), basis_bounds(6, 4, 2)
    assert bounds.b * bounds.a * alpha == pytest.approx(plain.b * plain.a)
    weight = normal(0, 8, 12, dtype=torch.float32)
    params = init({"w": weight}, rank=3, alpha=alpha, seed=0, targets=["w"])
    one = init({"w": weight}, rank=3, seed=0, targets=["w"])["w"]
    torch.testing.assert_close(materialize(params)["w"], weight)
    torch.testing.assert_close(params["w"].base, one.base)
    for new, old in zip(params["w"].factors[:2], one.factors, strict=True):
        torch.testing.assert_close(new * sqrt(alpha), old)
    plan = dl.schedules.every(1)(3, params)
    vectors, old = dl.candidates(params["w"], plan["w"]), dl.candidates(one, plan["w"])
    torch.testing.assert_close(vectors.a * sqrt(alpha), old.a)
    pools = init_pool(params)["w"], init_pool({"w": one})["w"]
    torch.testing.assert_close(pools[0].b.vectors * sqrt(alpha), pools[1].b.vectors)
    larger = resize(params, rank=4).params["w"], resize({"w": one}, rank=4).params["w"]
    torch.testing.assert_close(larger[0].factors.b * sqrt(alpha), larger[1].factors.b)


def test_lora_starts_as_in_peft_for_every_alpha():
    weight = normal(0, 8, 12, dtype=torch.float32)
    one, other = (
        init({"w": weight}, rank=3, alpha=alpha, seed=0, targets=["w"], start="lora")["w"] for alpha in (1, 6)
    )
    assert_same(other.factors[:2], tuple(one.factors))
    assert_same(other.base, weight)


def test_an_alpha_of_one_changes_nothing():
    weight = normal(0, 8, 12, dtype=torch.float32)
    assert_same(*(init({"w": weight}, rank=3, seed=0, targets=["w"], **each) for each in ({}, {"alpha": 1.0})))


@pytest.mark.parametrize("storage", [Storage("float64", None), Storage("int8", None), Storage("nf4", "int8")], ids=str)
@pytest.mark.parametrize("waiting", [0, 4])
def test_whatever_reads_the_dense_weight_reads_the_same(storage, waiting):
    param = low_rank(Shape(8, 64, 3), storage=storage, waiting=waiting, alpha=4.0)
    plain = param._replace(factors=Factors(4 * param.factors.b, param.factors.a))
    assert_same(materialize(param), materialize(plain))
    assert_same(drift(param), drift(plain))
    if not waiting:
        assert_same(merge(param).base, merge(plain).base)
    if storage.kind == "int8":
        assert torch.equal(to_torchao(param).dequantize(), to_torchao(plain).dequantize())


def test_a_fold_adds_alpha_over_rank_times_the_product():
    param = low_rank(Shape(6, 4, 2), alpha=3.0)
    b, a = normal(1, 6, 5), normal(2, 5, 4)
    torch.testing.assert_close(fold(param, b, a).base, param.base + 1.5 * b @ a)


def test_deferred_folds_have_the_divisor_of_the_weight():
    param = low_rank(Shape(6, 4, 2), alpha=4.0)
    deferred = defer(param, vectors=4)
    assert deferred.base.divisor.value == 0.5
    new, _ = switch(deferred, dl.schedules.every(1)(0, {"w": deferred})["w"])
    assert new.base.pending.b.any()
    torch.testing.assert_close(materialize(new), materialize(param))
    smaller = resize({"w": new}, rank=1).params["w"]
    assert smaller.base.divisor.value == 0.25
    torch.testing.assert_close(materialize(smaller), materialize(param))


def test_quantized_weights_keep_their_alpha():
    param = low_rank(Shape(8, 64, 3), alpha=0.3, base_dtype=torch.float32)
    assert quantize(param, "int8").alpha == 0.3
