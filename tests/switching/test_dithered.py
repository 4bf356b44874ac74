"""The authors' randomly dithered plan."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynlora_fn.schedules import Schedule, dithered, every, switchlora
from dynlora_fn.testing import Shape, assert_same, low_rank, seeds
from tests.support.schedules import assert_no_frozen_vector_is_switched, plans_of, ranks, switched, weight


def test_dithering_keeps_the_rate_on_average():
    """No switch is held back: five steps switch at most 15 of 64 slots."""
    steps, stack = 4000, (2, 3)
    schedule = switchlora(steps)
    tables = dithered(schedule, {"w": weight(400, 400, 64, stack)}, total_steps=steps, seed=0).switched["w"]
    assert tables.shape == (steps + 1, *stack)
    wanted = math.fsum(64 / 40 * schedule.decay ** (step + 1) for step in range(steps))
    # Each step's number is rounded up or down, with a variance of at most 1/4: five standard deviations of the sum.
    assert (tables[-1] - wanted).abs().max() < 5 * math.sqrt(steps / 4)
    assert tables[-1].unique().numel() > 1  # each member draws another one


def test_dithering_holds_back_what_would_meet_a_frozen_vector():
    """With rank 4 and interval 10 a step requests 0.4 switches, and any five steps have at most 2."""
    steps = 20_000
    table = dithered(Schedule(interval=10), {"w": weight(64, 64, 4)}, total_steps=steps, seed=0).switched["w"]
    in_five = table[5:] - table[:-5]
    assert in_five.max() == 2
    # The rate of that process, by its stationary distribution over what the last four steps did.
    share = dict.fromkeys(((a, b, c, d) for a in (0, 1) for b in (0, 1) for c in (0, 1) for d in (0, 1)), 1 / 16)
    for _ in range(200):
        new = dict.fromkeys(share, 0.0)
        for lately, part in share.items():
            chance = 0.4 if sum(lately) < 2 else 0.0
            new[(*lately[1:], 1)] += part * chance
            new[(*lately[1:], 0)] += part * (1 - chance)
        share = new
    rate = 0.4 * sum(part for lately, part in share.items() if sum(lately) < 2)
    assert rate < 0.3
    # Holding back makes the numbers more even than independent ones, of variance below 1/4.
    assert abs(table[-1].item() / steps - rate) < 5 * math.sqrt(1 / 4 / steps)


@given(ranks, st.integers(0, 6), st.integers(0, 20), seeds)
def test_dithered_plans_meet_no_frozen_vector_and_go_in_turn(rank, freeze, longer, seed):
    param = weight(64, 64, rank)
    schedule = dithered(
        Schedule(interval=max(2 * freeze, 1) + longer, freeze=freeze), {"w": param}, total_steps=60, seed=seed
    )
    plans = list(plans_of(schedule, param, 60))
    assert_no_frozen_vector_is_switched(iter(plans), rank)
    done = 0
    for step, plan in enumerate(plans):
        count = len(switched(plan.a))
        assert schedule.switches(step, {"w": param}) == 2 * count
        assert switched(plan.a) == [((done + k) % rank, rank + done + k) for k in range(count)]
        assert switched(plan.b) == [((done + k + rank // 2) % rank, rank + done + k) for k in range(count)]
        done += count
    if rank == 1 and freeze:
        assert not done  # both sides name the one slot


def test_dithered_plans_are_a_function_of_the_seed():
    params = {"w": weight(64, 64, 8, (3,)), "v": weight(64, 64, 8), "full": weight(8, 64, 8), "norm": torch.zeros(2)}
    first, same, other = (dithered(switchlora(100), params, total_steps=100, seed=seed) for seed in (1, 1, 2))
    assert_same(first.switched, same.switched)
    assert first.switched.keys() == {"w", "v"}
    assert not torch.equal(first.switched["w"], other.switched["w"])
    for step in range(100):
        assert_same(first(torch.tensor(step), params), first(step, params))
        assert first(step, params)["w"].a.slots.shape[:-1] == (3,)


def test_a_dithered_plan_is_a_function_of_the_step_in_a_graph_too():
    params = {"w": low_rank(Shape(16, 12, 4))}
    schedule = dithered(Schedule(interval=10), params, total_steps=20, seed=0)
    compiled = torch.compile(lambda step: schedule(step, params), backend="aot_eager", fullgraph=True)
    for step in range(20):
        assert_same(compiled(torch.tensor(step)), schedule(step, params))


@pytest.mark.parametrize("schedule", [every(10), Schedule(interval=40, every=2)])
def test_only_a_rate_step_by_step_can_be_dithered(schedule):
    with pytest.raises(ValueError, match="`schedule` must have count=None and every=1 to be dithered"):
        dithered(schedule, {"w": weight(8, 8, 2)}, total_steps=10, seed=0)


def test_whole_numbers_are_not_dithered():
    """Rates of 32, 16, ..., 1 leave nothing to draw."""
    schedule = Schedule(interval=1, decay=0.5, freeze=0)
    table = dithered(schedule, {"w": weight(400, 400, 64)}, total_steps=6, seed=0).switched["w"]
    assert table.diff().tolist() == [32, 16, 8, 4, 2, 1]


def test_the_numbers_are_drawn_on_the_host_whatever_the_default_device():
    params = {"w": weight(16, 16, 4)}
    wanted = dithered(Schedule(interval=10), params, total_steps=20, seed=0)
    with torch.device("meta"):
        got = dithered(Schedule(interval=10), params, total_steps=20, seed=0)
        assert_same(got(3, params), wanted(3, params))
    assert_same(got.switched, wanted.switched)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64 + 1, -(2**70)])
def test_any_integer_is_a_seed(seed: int):
    params = {"w": weight(16, 16, 4)}
    first, same = (dithered(Schedule(interval=10), params, total_steps=20, seed=seed) for _ in range(2))
    assert_same(first.switched, same.switched)


@pytest.mark.parametrize("step", [20, torch.tensor(20), torch.tensor(99, dtype=torch.uint8)], ids=str)
def test_a_step_after_the_run_is_refused(step):
    params = {"w": weight(16, 16, 4)}
    schedule = dithered(Schedule(interval=10), params, total_steps=20, seed=0)
    with pytest.raises(ValueError, match=r"`step` is \d\d, but the schedule was dithered for 20 steps"):
        schedule(step, params)


def test_a_weight_that_was_not_dithered_is_refused():
    params = {"w": weight(16, 16, 4), "full": torch.ones(3)}
    schedule = dithered(Schedule(interval=10), params, total_steps=20, seed=0)
    whole = {**params, "at full rank": weight(4, 16, 4)}  # never switched
    assert_same(schedule(3, whole), schedule(3, params))
    with pytest.raises(ValueError, match="`params` has the low-rank 'v', for which no schedule was dithered"):
        schedule(3, {**params, "v": weight(16, 16, 4)})


def test_both_sides_of_a_slot_are_switched_together_where_only_b_is_trained():
    params = {"w": low_rank(Shape(8, 8, 1), trained="b")}
    schedule = dithered(Schedule(interval=10), params, total_steps=40, seed=0)
    plans = [schedule(step, params)["w"] for step in range(40)]
    for plan in plans:
        assert_same(plan.b, plan.a)
    steps = [step for step, plan in enumerate(plans) if plan.a.active.any()]
    assert len(steps) > 1
    assert all(later - step >= 5 for step, later in pairwise(steps))  # while the column is frozen
