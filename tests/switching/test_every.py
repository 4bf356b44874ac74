"""Schedules that switch a fixed count every few steps."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynlora_fn.schedules import every
from tests.support.schedules import assert_no_frozen_vector_is_switched, plans_of, ranks, switched, weight


@pytest.mark.parametrize("count", [1, 2, 4, 9, "all"])
def test_every_so_many_steps_a_fixed_number_is_switched(count):
    rank, per_turn = 4, min(4, 9 if count == "all" else count)
    for step, plan in enumerate(plans_of(every(10, count), weight(5, 5, rank), 40)):
        turn = (step + 1) // 10 - 1
        for side, start in ((plan.b, rank // 2), (plan.a, 0)):
            first = turn * per_turn
            wanted = [((start + first + k) % rank, rank + first + k) for k in range(per_turn)]
            assert switched(side) == (wanted if (step + 1) % 10 == 0 else [])


def test_a_count_holds_at_full_rank_too_but_not_from_a_pool():
    full, nearly = {"w": weight(4, 6, 4)}, {"w": weight(6, 6, 4)}
    assert every(10).switches(9, full) == 8
    assert every(10, from_pool=True)(9, full) == {}
    assert every(10, from_pool=True).switches(9, nearly) == 4  # 2 idle ones on each side


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 12), ranks)
def test_a_count_meets_no_frozen_vector_or_is_refused(steps, count, freeze, rank):
    schedule, param = every(steps, count, freeze=freeze), weight(64, 64, rank)
    if min(count, rank) * math.ceil(freeze / steps) > rank // 2:
        with pytest.raises(ValueError, match=rf"`count` must be at most {rank // 2} in any {freeze} steps"):
            schedule(0, {"w": param})
    else:
        assert_no_frozen_vector_is_switched(plans_of(schedule, param, 60), rank)


def test_as_many_as_half_the_slots_fit_into_a_freeze():
    assert every(5, 2, freeze=5).most(weight(9, 8, 4)) == 2
    with pytest.raises(ValueError, match="`count` must be at most 2 in any 5 steps"):
        every(5, 3, freeze=5).most(weight(9, 8, 4))
