"""Plans: how many vectors, which slots, which vectors, and never one that is frozen."""

import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import accumulate

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves, tree_map

from dynlora_fn import LowRank
from dynlora_fn.schedules import Schedule, every, never, switchlora
from dynlora_fn.testing import assert_same, schedules
from tests.support.schedules import assert_no_frozen_vector_is_switched, plans_of, ranks, switched, weight

rates = schedules(kinds=["rate"])  # down to the shortest interval that the freeze allows


def due(schedule: Schedule, param: LowRank, steps: int) -> Iterator[Fraction]:
    """Yield the switches that are due after each number of steps, rank * turns, in exact arithmetic."""
    rank, decay = param.factors.a.shape[-2], Fraction(schedule.decay)
    total = Fraction(0)
    for step in range(steps):
        yield total * rank / Fraction(schedule.interval)
        total += decay ** (step + 1)


@given(rates, ranks)
@example(Schedule(interval=49, every=49, freeze=0), 1)  # 1 / 49 * 49 < 1 in floating point
@example(Schedule(interval=10), 7)  # and 7 / 10 * 45 + 3.5 is 35
def test_as_many_are_switched_as_come_due(schedule: Schedule, rank):
    param, steps = weight(60, 40 + rank, rank), 4 * 49 + 1
    wanted = list(due(schedule, param, steps + 1))
    counted = {"b": 0, "a": 0}
    for step, plan in enumerate(plans_of(schedule, param, steps), start=1):
        for name in counted:
            counted[name] += len(switched(getattr(plan, name)))
        done = wanted[step - step % schedule.every]
        assert counted["a"] == math.floor(done), step
        assert counted["b"] == math.floor(done + Fraction(rank, 2)) - rank // 2, step


@given(ranks, st.integers(1, 30))
def test_every_slot_is_switched_once_an_interval_on_each_side(rank, interval):
    """The check includes rank 1."""
    param = weight(64, 64, rank)
    switches = {"b": [], "a": []}
    for plan in plans_of(Schedule(interval=interval, freeze=0), param, 5 * interval):
        switches["b"] += [slot for slot, _ in switched(plan.b)]
        switches["a"] += [slot for slot, _ in switched(plan.a)]
    for slots in switches.values():
        assert sorted(slots) == sorted(list(range(rank)) * 5)


@given(rates, ranks, st.integers(1, 40))
@example(Schedule(interval=10, every=10, freeze=0), 12, 2)  # fewer idle ones than come due
def test_slots_and_vectors_come_in_turn(schedule: Schedule, rank, idle):
    """Side b starts half a turn behind, and both sides continue after the first `rank` vectors of the basis.

    No vector is skipped while at most the idle vectors are switched.
    """
    entries = {"b": [], "a": []}
    for plan in plans_of(schedule, weight(rank + idle, 64, rank), 100):
        entries["b"] += switched(plan.b)
        entries["a"] += switched(plan.a)
    for name, start in (("b", rank // 2), ("a", 0)):
        wanted = [((start + index) % rank, rank + index) for index in range(len(entries[name]))]
        assert entries[name] == wanted


@given(st.floats(0.1, 4), st.sampled_from([1, 3, 10]), st.integers(0, 2), ranks)
def test_the_active_slots_of_a_side_are_distinct(interval, steps, freeze, rank):
    """Any short interval either works or is refused."""
    try:
        schedule = Schedule(interval=interval, every=steps, freeze=freeze)
    except ValueError:
        return
    for plan in plans_of(schedule, weight(64, 64, rank), 2 * steps):
        for side in (plan.b, plan.a):
            slots = [slot for slot, _ in switched(side)]
            assert len(slots) == len(set(slots))


@given(rates, ranks)
@example(Schedule(interval=10), 7)  # at step 94, in floating point
def test_no_switch_meets_a_frozen_vector(schedule: Schedule, rank):
    assert_no_frozen_vector_is_switched(plans_of(schedule, weight(64, 64, rank), 300), rank)


def test_the_rate_falls_as_the_paper_says():
    """40,000 steps: 83 turns, half of them before step 2,302, 99 % before 15,300."""
    rank = 10**6  # so many that a turn is counted to a millionth
    param = weight(10**7, 10**7, rank)
    schedule = switchlora(40_000)
    switches = [schedule.switches(step, {"w": param}) for step in range(40_000)]
    turns = [total / (2 * rank) for total in accumulate(switches)]
    assert 83 <= turns[-1] < 84
    half, most = (next(step for step, n in enumerate(turns) if n >= share * turns[-1]) for share in (0.5, 0.99))
    assert half == 2302
    assert 15_290 < most < 15_300


@given(rates, ranks, st.integers(0, 10**6))
@example(Schedule(interval=49, freeze=0), 7, 2**25 + 1)  # which float32 rounds
def test_a_step_in_a_tensor_gives_the_same_plan(schedule: Schedule, rank, step):
    params = {"w": weight(64, 40, rank)}
    assert_same(schedule(torch.tensor(step), params), schedule(step, params))


@given(rates, ranks)
def test_a_step_in_a_tensor_is_not_read(schedule: Schedule, rank):
    """A plan is made on the device without a wait for it: tensors on the meta device have no values."""
    params = {"w": tree_map(lambda leaf: leaf.to("meta"), weight(64, 40, rank))}
    step = torch.empty((), dtype=torch.int64, device="meta")
    of_meta, plan = schedule(step, params)["w"], schedule(0, {"w": weight(64, 40, rank)}).get("w")
    assert all(leaf.is_meta for leaf in tree_leaves(of_meta))
    if plan is not None:
        assert tree_map(lambda leaf: leaf.shape, of_meta) == tree_map(lambda leaf: leaf.shape, plan)


@given(rates, ranks, st.sampled_from([(), (3,), (2, 3)]))
def test_switches_counts_the_active_entries_of_the_whole_stack(schedule: Schedule, rank, stack):
    params = {"w": weight(64, 64, rank, stack), "full": weight(rank, 64, rank), "norm": torch.zeros(3)}
    for step in range(60):
        plans = schedule(step, params)
        active = sum(len(switched(plan.b)) + len(switched(plan.a)) for plan in plans.values())
        assert schedule.switches(step, params) == active * math.prod(stack)


@given(rates, st.integers(1, 8), ranks)
def test_a_step_takes_no_more_than_a_pool_has_idle(schedule: Schedule, idle, rank):
    for plan in plans_of(schedule, weight(rank + idle, 64, rank), 60):
        assert plan.b.slots.shape[-1] <= idle
        assert plan.a.slots.shape[-1] <= idle


@pytest.mark.parametrize("steps", [1, 7, 45])
def test_rounding_takes_no_more_than_a_pool_has_idle(steps):
    """For some decays 3 * 10.16 / 10.16 is slightly more than 3, and with 3 idle vectors it must round to 3."""
    for idle in range(1, 64, 2):
        param = weight(200 + idle, 300, 200)
        for fiftieths in range(1, 50):
            schedule = Schedule(interval=steps, decay=fiftieths / 50, every=steps, freeze=0)
            assert schedule(0, {"w": param})["w"].a.slots.shape[-1] <= idle


@pytest.mark.parametrize(("shape", "can_switch"), [((4, 9, 4), False), ((9, 4, 4), False), ((5, 5, 4), True)])
def test_full_rank_never_switches(shape, can_switch):
    params = {"w": weight(*shape)}
    schedule = Schedule(interval=10)
    assert bool(schedule(0, params)) == can_switch
    assert any(schedule.switches(step, params) for step in range(100)) == can_switch


def test_never_plans_nothing():
    params = {"w": weight(64, 64, 4)}
    assert all(never()(step, params) == {} for step in range(100))
    assert not any(never().switches(step, params) for step in range(100))


@given(st.integers(2, 10), ranks)
def test_batches_hold_what_single_steps_would_have_switched(steps, rank):
    param = weight(64, 64, rank)
    single, batched = (Schedule(interval=40, every=period, freeze=2) for period in (1, steps))
    for name in ("b", "a"):
        waiting = []
        for step in range(100):
            waiting += switched(getattr(single(step, {"w": param})["w"], name))
            got = switched(getattr(batched(step, {"w": param})["w"], name))
            is_due = (step + 1) % steps == 0
            assert got == (waiting if is_due else [])
            waiting = [] if is_due else waiting


def test_plans_say_for_how_long_the_counterparts_are_frozen():
    for freeze in (0, 3):
        plan = Schedule(interval=10, freeze=freeze)(0, {"w": weight(8, 8, 4)})["w"]
        assert plan.frozen_for.dtype == torch.int32
        assert plan.frozen_for == freeze


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interval": 0}, "`interval` is 0; use a number above 0"),
        ({"interval": -1.0}, r"`interval` is -1\.0; use a number above 0"),
        ({"decay": 0.0}, r"`decay` is 0\.0; use a number in \(0, 1\]"),
        ({"decay": 1.1}, r"`decay` is 1\.1; use a number in \(0, 1\]"),
        ({"every": 0}, "`every` is 0; use an integer of at least 1"),
        ({"count": 0}, "`count` is 0; use an integer of at least 1"),
        ({"freeze": -1}, "`freeze` is -1; use an integer of at least 0"),
        ({"interval": 9}, "`interval` must be at least 10, so that .* frozen for 5 steps, got 9"),
        ({"interval": 15, "every": 4}, "`interval` must be at least 16, .* got 15"),
        ({"interval": 40, "count": 2}, "`interval` is 40, which `count` = 2 would ignore"),
        ({"decay": 0.5, "count": "all", "freeze": 0}, r"`decay` is 0\.5, which `count` = 'all' would ignore"),
    ],
)
def test_schedules_that_cannot_be_kept_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**arguments)


@pytest.mark.parametrize("arguments", [{"total_steps": 0}, {"total_steps": 10, "ratio": 0}])
def test_a_run_without_steps_is_refused(arguments):
    with pytest.raises(
        ValueError, match=r"`(total_steps` is 0; use an integer of at least 1|ratio` is 0; use a number above 0)"
    ):
        switchlora(**arguments)


@pytest.mark.parametrize("schedule", [Schedule(interval=4, freeze=1), every(2, 1), switchlora(50, interval=10)])
def test_a_stack_has_the_plans_of_one_of_its_members(schedule):
    for step in range(12):
        alone, stacked = (schedule(step, {"w": weight(9, 8, 4, stack)}) for stack in ((), (3,)))
        assert_same(stacked, alone)
        assert schedule.switches(step, {"w": weight(9, 8, 4, (3,))}) == 3 * schedule.switches(
            step, {"w": weight(9, 8, 4)}
        )


def test_limits_are_those_of_the_matrix_in_a_stack():
    assert every(1, "all").most(weight(9, 8, 4, (3,))) == 4
    assert every(1, "all", from_pool=True).most(weight(6, 6, 4, (3,))) == 2


def test_defaults_are_the_papers():
    assert switchlora(1000) == Schedule(interval=40, decay=0.3 ** (1 / 100), freeze=5)
    assert switchlora(1).freeze == 5
    assert Schedule(count=3, freeze=0).most(weight(4, 4, 4)) == 3  # without a pool the candidates are unlimited
    assert Schedule(count=3, freeze=0, from_pool=True).most(weight(4, 4, 4)) == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_a_step_in_a_narrow_integer_does_not_overflow(dtype: torch.dtype):
    params = {"w": weight(32, 32, 8)}
    for schedule in (every(1, 4), Schedule(interval=10), switchlora(1000)):
        for step in (40, 127):
            assert_same(schedule(torch.tensor(step, dtype=dtype), params), schedule(step, params))


def test_a_negative_step_in_a_tensor_is_refused():
    with pytest.raises(ValueError, match="`step` is -1; use an integer of at least 0"):
        Schedule(interval=10)(torch.tensor(-1), {"w": weight(8, 8, 2)})
