"""What is true for every schedule in the table."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from dynlora_fn import switch
from dynlora_fn.testing import Shape, assert_same, assert_within, exact_weight, low_rank, rounding, untouched
from tests.support.schedule_table import SCHEDULES
from tests.support.schedules import assert_no_frozen_vector_is_switched, plans_of, switched, weight

STEPS = 60
every_schedule = pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
every_rank = pytest.mark.parametrize("rank", [4, 5, 12])


def params_of(rank: int = 4) -> dict[str, Any]:
    """Return a weight, a stack, a weight of full rank, and a tensor that is not low-rank."""
    return {
        "w": weight(24, 20, rank),
        "stack": weight(24, 20, rank, (2, 3)),
        "full": weight(rank, 64, rank),
        "norm": torch.zeros(3),
    }


@every_schedule
def test_a_plan_is_a_function_of_the_step(make: Callable[..., Any]):
    """Plans agree in any order of steps, from an equal schedule, and with the step in a tensor."""
    params = params_of()
    schedule, same = make(params, STEPS), make(params, STEPS)
    with untouched(params):
        plans = [schedule(step, params) for step in range(STEPS)]
    for step in reversed(range(STEPS)):
        assert_same(same(step, params), plans[step])
        assert_same(schedule(torch.tensor(step), params), plans[step])


@every_schedule
def test_all_steps_have_plans_of_the_same_kinds(make: Callable[..., Any]):
    params = params_of()
    schedule = make(params, STEPS)
    kinds = [
        tree_map(lambda leaf: (leaf.shape, leaf.dtype, leaf.device), schedule(step, params)) for step in range(STEPS)
    ]
    assert all(kind == kinds[0] for kind in kinds)
    assert kinds[0].keys() <= {"w", "stack", "full"}
    assert {leaf.dtype for leaf in tree_leaves(schedule(0, params))} <= {torch.int64, torch.bool, torch.int32}


@every_schedule
def test_a_schedule_that_comes_before_the_update_freezes_every_counterpart(make: Callable[..., Any]):
    params = params_of()
    schedule = make(params, STEPS)
    for step in range(STEPS):
        for plan in schedule(step, params).values():
            assert schedule.follows_update == (plan.frozen_for == 0)


@every_schedule
@every_rank
def test_slots_are_distinct_and_no_vector_enters_twice(make: Callable[..., Any], rank: int):
    param = weight(48, 40, rank)
    for name in ("b", "a"):
        entered = list(range(rank))  # the vectors that the factors start from
        for plan in plans_of(make({"w": param}, STEPS), param, STEPS):
            pairs = switched(getattr(plan, name))
            slots = [slot for slot, _ in pairs]
            assert len(set(slots)) == len(slots)
            assert set(slots) <= set(range(rank))
            entered += [index for _, index in pairs]
        assert len(set(entered)) == len(entered)


@every_schedule
@every_rank
def test_no_frozen_vector_is_switched(make: Callable[..., Any], rank: int):
    param = weight(48, 40, rank)
    assert_no_frozen_vector_is_switched(plans_of(make({"w": param}, STEPS), param, STEPS), rank)


@every_schedule
@every_rank
def test_switches_counts_the_active_entries_of_all_stacks(make: Callable[..., Any], rank: int):
    params = params_of(rank)
    schedule = make(params, STEPS)
    for step in range(STEPS):
        active = 0
        for name, plan in schedule(step, params).items():
            stack = params[name].seed.shape
            active += sum(int(side.active.expand(*stack, -1).sum()) for side in (plan.b, plan.a))
        assert schedule.switches(step, params) == active


@every_schedule
def test_one_graph_serves_all_steps(make: Callable[..., Any]):
    params = {"w": low_rank(Shape(12, 10, 4)), "stack": low_rank(Shape(12, 10, 4), (3,))}
    schedule = make(params, STEPS)
    compiled = torch.compile(lambda step: schedule(step, params), backend="aot_eager", fullgraph=True)
    compiled(torch.tensor(0))
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(0, STEPS, 7):
            assert_same(compiled(torch.tensor(step)), schedule(step, params))


@every_schedule
def test_its_plans_keep_the_weight(make: Callable[..., Any]):
    params = {"w": low_rank(Shape(12, 10, 4)), "stack": low_rank(Shape(12, 10, 4), (3,))}
    schedule = make(params, STEPS)
    for step in range(0, STEPS, 5):
        new = switch(params, schedule(step, params)).params
        for name, before in params.items():
            assert_within(exact_weight(new[name]), exact_weight(before), rounding(before, new[name]))
        params = new
