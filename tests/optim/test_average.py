"""An average of weights equals the average of the dense weights, whatever factors and bases both have."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import dynlora_fn as dl
from dynlora_fn import LowRank
from dynlora_fn.optim import average
from dynlora_fn.testing import (
    STORAGES,
    Shape,
    Storage,
    assert_same,
    assert_within,
    check_compiles,
    check_vmap,
    eps,
    exact_weight,
    low_rank,
    normal,
    rounding,
    seeds,
    stacks,
    untouched,
)
from dynlora_fn.testing._shadow import magnitude

FITTING = Shape(16, 64, 4)  # of a size that all blocks divide
DECAYS = st.sampled_from([0.0, 0.5, 0.99, 1.0])
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])


@st.composite
def weights(draw: st.DrawFn, stack: tuple[int, ...]) -> LowRank:
    return low_rank(
        FITTING,
        stack,
        draw(seeds),
        storage=draw(st.sampled_from(STORAGES)),
        factor_dtype=draw(DTYPES),
        waiting=draw(st.sampled_from([0, 8])),
    )


pairs = stacks.flatmap(lambda stack: st.tuples(weights(stack), weights(stack)))


@given(pairs, DECAYS)
def test_the_average_is_that_of_the_weights(pair, decay):
    averaged, param = pair
    with untouched(averaged, param):
        new = average(averaged, param, decay=decay)
    assert [(leaf.shape, leaf.dtype) for leaf in tree_leaves(new)] == [
        (leaf.shape, leaf.dtype) for leaf in tree_leaves(averaged)
    ]
    assert_same(new.seed, averaged.seed)
    wanted = decay * exact_weight(averaged) + (1 - decay) * exact_weight(param)
    rounded = eps(averaged.factors.b.dtype) * sum(magnitude(weight) for weight in (averaged, param, new))
    assert_within(exact_weight(new), wanted, rounding(averaged, new) + rounding(param, new) + rounded)


@given(stacks.flatmap(weights), DECAYS)
def test_an_average_of_dense_weights_is_dense(param, decay):
    averaged = normal(0, *param.shape)
    new = average(averaged, param, decay=decay)
    wanted = decay * averaged + (1 - decay) * exact_weight(param)
    assert_within(new, wanted, rounding(param, param) + 8 * eps(torch.float64) * (averaged.abs() + magnitude(param)))


@given(stacks.flatmap(weights))
def test_equal_weights_have_the_same_average(param):
    assert_same(average(param, param, decay=0.9), param)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_it_compiles_and_maps(storage: Storage):
    def averaged(old: LowRank, new: LowRank) -> LowRank:
        return average(old, new, decay=0.9)

    pair = tuple(low_rank(FITTING, (2,), seed, storage=storage) for seed in range(2))
    check_compiles(averaged, arguments=pair, tolerance=4.0)
    check_vmap(averaged, arguments=pair, tolerance=4.0)


def test_a_new_decay_does_not_compile_again():
    old, new = ({"w": low_rank(FITTING, (), seed), "bias": normal(seed, 5)} for seed in range(2))
    compiled = torch.compile(average, fullgraph=True, backend="aot_eager")
    compiled(old, new, decay=torch.tensor(0.9))
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(old, new, decay=torch.tensor(0.99))


@pytest.mark.parametrize("is_switched_too", [True, False])
def test_switches_do_not_change_the_average(is_switched_too):
    """Nothing is trained, so that all weights of the run are equal, and their average too."""
    start = {"w": low_rank(Shape(6, 8, 4))}
    schedule, params, averaged = dl.schedules.switchlora(total_steps=300, interval=8, freeze=1), start, start
    for step in range(60):
        plan = schedule(step, params)
        params = dl.switch(params, plan).params
        averaged = dl.switch(averaged, plan).params if is_switched_too else averaged
        averaged = average(averaged, params, decay=0.9)
        if is_switched_too:
            assert_same(averaged["w"].factors, params["w"].factors)
    assert_within(exact_weight(averaged["w"]), exact_weight(start["w"]), 1e-12)


def test_full_rank_tensors_are_averaged():
    averaged, params = {"bias": torch.zeros(3)}, {"bias": torch.ones(3)}
    assert_same(average(averaged, params, decay=0.75), {"bias": torch.full((3,), 0.25)})


def test_a_wider_average_of_bfloat16_moves():
    averaged, param = torch.ones(1), torch.full((1,), 2.0, dtype=torch.bfloat16)
    assert average(averaged, param, decay=0.999).item() == pytest.approx(1.001)


W = low_rank(Shape(6, 4, 2))


@pytest.mark.parametrize(
    ("averaged", "params", "decay", "message"),
    [
        (W, W, 1.5, "`decay` is 1.5; use a number from 0 to 1"),
        (W, W, torch.ones(2), r"`decay` has shape \(2,\); use a number or a 0-d tensor"),
        ({"w": W}, {"w": W, "v": W}, 0.9, "must have the same names, but only one has: v"),
        ({"w": W}, {"w": torch.zeros(6, 4)}, 0.9, r"`averaged` is low-rank for 'w', but `params` is a tensor"),
        ({"w": W}, {"w": low_rank(Shape(6, 5, 2))}, 0.9, r"has shape \(6, 4\) for 'w', but `params` has \(6, 5\)"),
        ({"w": W}, {"w": low_rank(Shape(6, 4, 3))}, 0.9, "has rank 2 for 'w', but `params` has rank 3; call `resize`"),
        (torch.tensor(7), torch.tensor(9), 0.9, "`averaged` has a tensor of dtype torch.int64 for 'param'"),
        (torch.zeros(4, 6), W, 0.9, r"has shape \(4, 6\) for 'param'"),
    ],
)
def test_what_cannot_be_averaged_is_refused(averaged: LowRank | dict | Tensor, params, decay, message):
    with pytest.raises(ValueError, match=message):
        average(averaged, params, decay=decay)


@pytest.mark.parametrize("decay", [torch.tensor(0.9999, dtype=torch.float64), Fraction(9999, 10000)], ids=repr)
def test_a_share_is_rounded_after_the_subtraction(decay):
    got = average({"w": torch.zeros(1)}, {"w": torch.ones(1)}, decay=decay)["w"]
    torch.testing.assert_close(got, torch.full((1,), 1e-4), rtol=1e-6, atol=0)


def test_weights_on_two_devices_are_refused_by_name():
    param = low_rank(Shape(6, 4, 2))
    other = tree_map(lambda leaf: leaf.to("meta"), param)
    for averaged in (param, dl.materialize(param)):
        with pytest.raises(ValueError, match="`averaged` has 'w' on cpu, but `params` on meta"):
            average({"w": averaged}, {"w": other}, decay=0.5)
