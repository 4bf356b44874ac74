"""Mistakes in one's own plan: each is named, in eager mode and where nothing can be read."""

from collections.abc import Callable

import pytest
import torch
from torch.utils._pytree import tree_map

from dynlora_fn import LowRank, Plan, SidePlan, candidates, init, partition, project_optimizer_state, switch
from dynlora_fn.optim import adamw
from dynlora_fn.schedules import every
from dynlora_fn.switching import draw, init_pool, put_back
from dynlora_fn.testing import Shape, assert_same, low_rank

PARAM = low_rank(Shape(6, 5, 2))
PLAN = every(1, 1)(0, {"w": PARAM})["w"]


def changed(**fields: object) -> Plan:
    return PLAN._replace(a=PLAN.a._replace(**fields))


MISTAKES: dict[str, tuple[object, str]] = {
    "slot = rank": (changed(slots=torch.tensor([2])), "has slot 2 for side a of 'param', which has rank 2"),
    "negative slot": (changed(slots=torch.tensor([-1])), "has slot -1 for side a of 'param'"),
    "int32 slots": (changed(slots=torch.tensor([0], dtype=torch.int32)), r"as `slots` .* of torch\.int64"),
    "a list": (changed(slots=[0]), r"has for side a of 'param' as `slots` \[0\]; use a tensor"),
    "a number": (changed(slots=torch.tensor(0)), "as `slots` a tensor of shape"),
    "active as integers": (changed(active=torch.tensor([1])), r"as `active` .* of torch\.bool"),
    "indices missing": (changed(indices=None), "as `indices` None"),
    "another device": (changed(indices=torch.zeros(1, dtype=torch.int64, device="meta")), "`indices` on meta"),
    "all on another device": (changed(**{n: t.to("meta") for n, t in PLAN.a._asdict().items()}), "`slots` on meta"),
    "stack axes": (changed(slots=torch.zeros(3, 1, dtype=torch.int64)), r"`slots` of shape \(3, 1\), .* has axes \(\)"),
    "fewer indices": (changed(indices=torch.zeros(0, dtype=torch.int64)), "0 `indices` and 1 `slots`"),
    "no side": (PLAN._replace(b=None), "has for side b of 'param' None; use a SidePlan"),
    "a plain tuple": (PLAN._replace(b=tuple(PLAN.b)), "use a SidePlan"),
    "frozen for a number": (PLAN._replace(frozen_for=5), "as `frozen_for` of 'param' 5; use a 0-d int32 tensor"),
    "frozen for half a step": (PLAN._replace(frozen_for=torch.tensor(0.5)), "as `frozen_for` of 'param'"),
    "None": (None, "has None for 'param'; pass a Plan"),
    "a dict": ({"w": PLAN}, "pass a Plan"),
}


@pytest.mark.parametrize(("plan", "message"), MISTAKES.values(), ids=MISTAKES)
@pytest.mark.parametrize("use", [switch, candidates])
def test_mistakes_in_a_plan_are_named(use: Callable, plan: object, message: str):
    with pytest.raises((TypeError, ValueError), match=f"`plan` .*{message}"):
        use(PARAM, plan)


@pytest.mark.parametrize("plan", [None, PLAN, [PLAN], {0: PLAN}])
@pytest.mark.parametrize("use", [switch, candidates])
def test_a_dict_of_weights_needs_a_dict_of_plans(use: Callable, plan: object):
    with pytest.raises(ValueError, match=r"`plan` (must be by parameter name|has the key 0)"):
        use({"w": PARAM}, plan)


@pytest.mark.parametrize(
    "incoming", [{"w": None}, {"w": [1.0]}, candidates(PARAM, PLAN), {}, {"v": candidates(PARAM, PLAN)}]
)
def test_incoming_vectors_are_by_the_names_of_the_plan(incoming: object):
    with pytest.raises((TypeError, ValueError), match="`incoming` "):
        switch({"w": PARAM}, {"w": PLAN}, incoming=incoming)


@pytest.mark.parametrize("plan", [{}, {"w": PLAN}])
def test_an_unknown_start_is_refused_for_any_plan(plan):
    with pytest.raises(ValueError, match="`start` must be 'switchlora' or 'lora', got 'zeros'"):
        candidates({"w": PARAM}, plan, start="zeros")


def test_a_plan_of_wrong_slots_changes_no_state():
    params = {"w": PARAM}
    state = adamw().init(partition(params).trainable)
    with pytest.raises(ValueError, match="`plan` has slot 7 for side a of 'w', which has rank 2"):
        project_optimizer_state(state, {"w": changed(slots=torch.tensor([7]))})
    with pytest.raises(ValueError, match=r"`plan` has for side a of 'w' `slots` of shape \(1, 1\)"):
        project_optimizer_state(state, {"w": changed(slots=torch.zeros(1, 1, dtype=torch.int64))})


def test_a_plan_that_is_no_plan_changes_no_state():
    state = adamw().init(partition({"w": PARAM}).trainable)
    for wrong, message in (
        (None, "`plan` has None for 'w'"),
        (changed(active=torch.ones(1)), "`plan` has for side a of 'w' as `active` a tensor"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            project_optimizer_state(state, {"w": wrong})


def test_a_plan_of_a_stack_may_have_its_axes_or_none():
    param, plan = low_rank(Shape(6, 5, 2), (3,)), PLAN
    stacked = Plan(*(SidePlan(*(leaf.expand(3, 1) for leaf in side)) for side in (plan.b, plan.a)), plan.frozen_for)
    assert_same(switch(param, plan), switch(param, stacked))
    with pytest.raises(ValueError, match=r"`slots` of shape \(2, 1\), but the stack has axes \(3,\)"):
        switch(param, plan._replace(b=plan.b._replace(slots=torch.zeros(2, 1, dtype=torch.int64))))


def test_slots_are_not_read_under_vmap_or_compiled():
    def slot_after(slots: torch.Tensor) -> torch.Tensor:
        return switch(PARAM, changed(slots=slots)).param.factors.a

    batches = torch.tensor([[0], [1]])
    assert_same(torch.vmap(slot_after)(batches), torch.stack([slot_after(slots) for slots in batches]))
    compiled = torch.compile(slot_after, backend="eager", fullgraph=True)
    assert_same(compiled(batches[1]), slot_after(batches[1]))


def test_pools_and_outgoing_vectors_are_those_of_the_plan():
    params = {"w": init({"w": torch.ones(6, 6)}, rank=2, seed=0, targets=["w"])["w"]}
    pools, plans = init_pool(params), every(1, 1, from_pool=True)(0, params)
    outgoing = draw(pools, plans)
    for use in (draw, lambda pool, plan: put_back(pool, plan, outgoing)):
        with pytest.raises(ValueError, match=r"`pool` has no pool for the planned \['w'\]"):
            use({}, plans)
        with pytest.raises(TypeError, match="`pool` is None for 'param'; pass a Pool"):
            use(None, plans["w"])
        with pytest.raises(ValueError, match="`plan` must be by parameter name"):
            use(pools, plans["w"])
        with pytest.raises(ValueError, match="`plan` is on meta for 'w', but `pool` on cpu; pass tensors with data"):
            use(pools, tree_map(lambda leaf: leaf.to("meta"), plans))
    with pytest.raises(ValueError, match="`outgoing` is on meta for 'w', but `pool` on cpu"):
        put_back(pools, plans, {"w": outgoing["w"]._replace(a=outgoing["w"].a.to("meta"))})
    for wrong in (None, [1], {"w": None}, {}, {"w": outgoing["w"]._replace(b=torch.ones(6, 3))}):
        with pytest.raises((TypeError, ValueError), match=r"`outgoing(\.b)?` "):
            put_back(pools, plans, wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": torch.ones(5, 6)}, r"`params` has a base of shape \(5, 6\) for 'w', .* of shape \(6, 5\)"),
        ({"base": torch.ones(6, 5).int()}, r"has dtype torch\.int32 for the base of 'w'"),
        ({"base": [1.0]}, r"has \[1.0\] as base of 'w'"),
        ({"factors": PARAM.factors._replace(b=torch.ones(1, 3))}, r"factors of 'w' of shapes \(1, 3\) and \(2, 5\)"),
        ({"factors": tuple(PARAM.factors)}, "in place of the factors of 'w'; use Factors"),
        ({"factors": PARAM.factors._replace(a=PARAM.factors.a.to("meta"))}, "`a` of 'w' on meta"),
        ({"seed": 3}, "has 3 as seed of 'w'; use an int64 tensor"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, r"a seed of shape \(2,\) for 'w'"),
    ],
)
def test_weights_whose_tensors_do_not_fit_are_refused(change: dict, message: str):
    with pytest.raises((TypeError, ValueError), match=message):
        switch({"w": LowRank(*PARAM)._replace(**change)}, {"w": PLAN})
