"""Pools lose no vector and store none twice, for any switch, and write memory only if donated."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dynlora_fn import Factors, LowRank, Plan, SidePlan, candidates, init, switch
from dynlora_fn.schedules import Schedule
from dynlora_fn.switching import Pool, draw, init_pool, put_back
from dynlora_fn.testing import Shape, any_shapes, assert_same, normal, plan_of, seeds, untouched

members = st.integers(1, 3)  # of a stack; a single weight has no stack axis


@st.composite
def idle_shapes(draw: st.DrawFn) -> Shape:
    """Weights whose pools have at least one idle candidate."""
    out_features, in_features = draw(st.integers(2, 8)), draw(st.integers(2, 8))
    return Shape(out_features, in_features, draw(st.integers(1, min(out_features, in_features) - 1)))


def make(shape: Shape, members: int, seed: int) -> tuple[LowRank, Pool]:
    model = {f"{member}.w": normal(seed + member, *shape[:2]) for member in range(members)}
    params = init(model, rank=shape.rank, seed=seed, targets=["*"], dtype=torch.float64)
    (param,), (pool,) = params.values(), init_pool(params).values()
    return param, pool


def plans_in_turn(param: LowRank, steps: int = 40) -> list[Plan]:
    """Return plans of half of the vectors, or of all idle ones if fewer: the pool wraps several times."""
    schedule = Schedule(interval=2, freeze=1)
    return [schedule(step, {"w": param})["w"] for step in range(steps)]


def train(param: LowRank, seed: int) -> LowRank:
    """Return the weight with other values in every vector in use."""
    return param._replace(factors=tree_map(lambda leaf: leaf + normal(seed, *leaf.shape), param.factors))


def sides(param: LowRank, pool: Pool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield for each member and side: vectors in use (rank, n), rows of the pool (size, n), rows in use (rank,)."""
    for at in np.ndindex(*param.seed.shape):
        yield param.factors.b[at].mT, pool.b.vectors[at], pool.b.held[at]
        yield param.factors.a[at], pool.a.vectors[at], pool.a.held[at]


def inventory(param: LowRank, pool: Pool) -> list[list[list[float]]]:
    """Return all vectors of each member and side, in use and idle, in the order of their values."""
    return [
        sorted([*used.tolist(), *(row for at, row in enumerate(rows.tolist()) if at not in in_use.tolist())])
        for used, rows, in_use in sides(param, pool)
    ]


@given(any_shapes, members, seeds)
def test_a_new_pool_holds_the_first_vectors_of_the_basis(shape: Shape, member_count, seed):
    param, pool = make(shape, member_count, seed)
    size = min(shape[:2])
    assert pool.b.vectors.shape == (*param.seed.shape, size, shape.out_features)
    assert pool.a.vectors.shape == (*param.seed.shape, size, shape.in_features)
    for used, rows, in_use in sides(param, pool):
        assert_same(rows[in_use], used)
        assert sorted(in_use.tolist()) == list(range(shape.rank))
    side = SidePlan(torch.zeros(size).long(), torch.arange(size), torch.ones(size).bool())
    numbered = candidates(param, Plan(side, side, torch.tensor(0)))
    assert_same((pool.b.vectors.mT, pool.a.vectors), tuple(numbered))


def test_a_pool_is_made_for_every_low_rank_weight_and_on_its_own_device():
    params = init({"w": normal(0, 4, 6), "norm": normal(1, 6)}, rank=2, seed=0, targets=["w"])
    pools = init_pool(params, device="meta")
    assert pools.keys() == {"w"}
    assert all(leaf.device.type == "meta" for leaf in tree_leaves(pools))
    assert all(leaf.device.type == "cpu" for leaf in tree_leaves(init_pool(params)))


@given(idle_shapes(), members, seeds)
def test_no_vector_is_lost_or_held_twice(shape: Shape, member_count, seed):
    param, pool = make(shape, member_count, seed)
    for step, plan in enumerate(plans_in_turn(param)):
        before = inventory(param, pool)
        param, outgoing = switch(param, plan, incoming=draw(pool, plan))
        pool = put_back(pool, plan, outgoing)
        assert inventory(param, pool) == before
        for _, rows, in_use in sides(param, pool):
            assert len(set(in_use.tolist())) == shape.rank
            assert 0 <= in_use.min() <= in_use.max() < len(rows)
        param = train(param, step)


@given(idle_shapes(), members, seeds)
def test_switched_slots_hold_the_rows_that_the_plan_names(shape: Shape, member_count, seed):
    param, pool = make(shape, member_count, seed)
    for plan in plans_in_turn(param):
        drawn = draw(pool, plan)
        new, outgoing = switch(param, plan, incoming=drawn)
        returned = put_back(pool, plan, outgoing)
        for name, vectors in (("b", drawn.b.mT), ("a", drawn.a)):
            slots, indices, active = (leaf.tolist() for leaf in getattr(plan, name))
            before, after = getattr(pool, name), getattr(returned, name)
            in_use = before.held.clone()
            for entry in range(len(slots)):
                row = indices[entry] % min(shape[:2])
                assert_same(vectors[..., entry, :], before.vectors[..., row, :])
                if active[entry]:
                    in_use[..., slots[entry]] = row
            assert_same(after.held, in_use)
        param, pool = train(new, seed), returned


@given(idle_shapes(), members, seeds)
def test_a_run_with_a_pool_equals_a_seeded_one_until_the_pool_wraps(shape: Shape, member_count, seed):
    seeded, pool = make(shape, member_count, seed)
    stored, has_wrapped = seeded, False
    for step, plan in enumerate(plans_in_turn(seeded)):
        stored, outgoing = switch(stored, plan, incoming=draw(pool, plan))
        pool = put_back(pool, plan, outgoing)
        seeded = switch(seeded, plan).param
        highest = max(int(side.indices[side.active].max()) if side.active.any() else 0 for side in (plan.b, plan.a))
        if highest >= min(shape[:2]):
            has_wrapped = True
            assert not torch.equal(stored.factors.b, seeded.factors.b) or not torch.equal(
                stored.factors.a, seeded.factors.a
            )  # a trained vector came back
            break
        assert_same(stored, seeded)
        stored, seeded = train(stored, step), train(seeded, step)
    assert has_wrapped


@given(idle_shapes(), members, seeds)
def test_donated_pools_equal_undonated_ones_and_keep_their_memory(shape: Shape, member_count, seed):
    param, pool = make(shape, member_count, seed)
    donated = tree_map(torch.clone, pool)
    memory = [leaf.data_ptr() for leaf in tree_leaves(donated)]
    for step, plan in enumerate(plans_in_turn(param)):
        new, outgoing = switch(param, plan, incoming=draw(pool, plan))
        with untouched(pool, plan, outgoing, param):
            new_pool = put_back(pool, plan, outgoing)
        donated = put_back(donated, plan, outgoing, donate=True)
        assert_same(donated, new_pool)
        assert [leaf.data_ptr() for leaf in tree_leaves(donated)] == memory
        param, pool = train(new, step), new_pool


@given(idle_shapes(), seeds)
def test_a_stack_of_pools_is_the_loop_over_its_members(shape: Shape, seed):
    param, pool = make(shape, 3, seed)
    for step, shared in enumerate(plans_in_turn(param, steps=10)):
        # Each member has another plan: with none, half and all of the entries active.
        varied = Plan(*(_vary(side) for side in (shared.b, shared.a)), shared.frozen_for)
        for plan in (shared, varied):
            outgoing = switch(train(param, step), plan, incoming=draw(pool, plan)).outgoing
            together = draw(pool, plan), put_back(pool, plan, outgoing)
            alone = [
                _exchange(_member(pool, at), _member(plan, at, is_per_member=plan is varied), _member(outgoing, at))
                for at in range(3)
            ]
            assert_same(together, tree_map(lambda *leaves: torch.stack(leaves), *alone))
        pool = together[1]


def _vary(side: SidePlan) -> SidePlan:
    slots, indices, active = (leaf.repeat(3, 1) for leaf in side)
    active[0], active[1, ::2] = False, False
    return SidePlan(slots, indices, active)


def _member(tree, member: int, *, is_per_member: bool = True):
    return tree_map(lambda leaf: leaf[member] if is_per_member and leaf.ndim else leaf, tree)


def _exchange(pool: Pool, plan: Plan, outgoing: Factors) -> tuple[Factors, Pool]:
    return draw(pool, plan), put_back(pool, plan, outgoing)


def test_an_idle_entry_may_name_what_an_active_one_writes():
    """An entry that is not active may name any slot and any row."""
    param, pool = make(Shape(6, 5, 3), 1, 0)
    for active in ([True, False], [False, True], [False, False]):
        side = SidePlan(torch.tensor([1, 1]), torch.tensor([3, 3]), torch.tensor(active))
        plan = Plan(side, side, torch.tensor(0))
        outgoing = switch(train(param, 1), plan, incoming=draw(pool, plan)).outgoing
        got = put_back(pool, plan, outgoing)
        wanted = pool.a.held.clone()
        wanted[1] = 3 if any(active) else wanted[1]
        assert_same(got.a.held, wanted)
        assert_same(got.a.vectors[1], outgoing.a[0] if any(active) else pool.a.vectors[1])


def test_pools_by_name_keep_those_without_a_plan():
    first, second = make(Shape(6, 5, 3), 1, 0), make(Shape(4, 4, 2), 1, 1)
    pools, plan = {"q": first[1], "k": second[1]}, {"q": plan_of(3, b=1, a=2)}
    incoming = draw(pools, plan)
    assert_same(incoming, {"q": draw(first[1], plan["q"])})
    outgoing = {"q": switch(first[0], plan["q"], incoming=incoming["q"]).outgoing}
    got = put_back(pools, plan, outgoing)
    assert got["k"] is pools["k"]
    assert_same(got["q"], put_back(first[1], plan["q"], outgoing["q"]))


def test_a_plan_for_more_vectors_than_are_idle_is_refused():
    _, pool = make(Shape(6, 5, 3), 1, 0)
    draw(pool, plan_of(3, b=2, a=2))
    for counts in ({"b": 3, "a": 1}, {"b": 1, "a": 3}):
        with pytest.raises(ValueError, match="`plan` takes 3 vectors of a side, but only 2 of 5 are idle"):
            draw(pool, plan_of(3, **counts))


def test_the_first_entry_of_a_slot_counts_in_the_pool_too():
    param, pool = make(Shape(6, 5, 3), 1, 0)
    side = SidePlan(torch.tensor([1, 1]), torch.tensor([3, 4]), torch.tensor([True, True]))
    plan = Plan(side, side, torch.tensor(0))
    before = inventory(param, pool)
    new, outgoing = switch(param, plan, incoming=draw(pool, plan))
    got = put_back(pool, plan, outgoing)
    assert got.a.held[1] == got.b.held[1] == 3
    assert inventory(new, got) == before
