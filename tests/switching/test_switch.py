"""Switching keeps the weight, and all that follows from it: invariants 1 to 4."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map

from dynlora_fn import Factors, LowRank, Plan, SidePlan, candidates, linear, switch
from dynlora_fn.testing import (
    Shape,
    assert_same,
    assert_within,
    eps,
    exact_weight,
    low_rank,
    normal,
    plan_of,
    plans,
    seeds,
)
from tests.support import reference
from tests.support.strategies import plain_params

# A weight, a plan for it, and a seed for everything else.
cases = plain_params().flatmap(lambda param: st.tuples(st.just(param), plans(param), seeds))


def vectors(param: LowRank, plan: Plan, seed: int) -> Factors:
    """Return random incoming vectors that do not come from a basis."""
    (out_features, in_features), dtype, stack = param.base.shape[-2:], param.factors.a.dtype, param.seed.shape
    return Factors(
        b=normal(seed, *stack, out_features, plan.b.slots.shape[-1], dtype=dtype),
        a=normal(seed + 1, *stack, plan.a.slots.shape[-1], in_features, dtype=dtype),
    )


def entries(plan: SidePlan, at: tuple[int, ...], rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield each switched slot with its incoming vector: the first of duplicates."""
    slots, active = (leaf.broadcast_to(rows.shape[:-1])[at].tolist() for leaf in (plan.slots, plan.active))
    for entry, slot in enumerate(slots):
        if active[entry] and slot not in [slots[before] for before in range(entry) if active[before]]:
            yield slot, rows[at][entry]


def switched_slowly(param: LowRank, plan: Plan, incoming: Factors) -> tuple[LowRank, Tensor]:
    """Switch slot by slot in float64, and return the magnitudes of all terms added to the base too."""
    base, b, a = (leaf.double().clone() for leaf in (param.base, *param.factors))
    magnitude, rank = base.abs(), a.shape[-2]
    for at in np.ndindex(*param.seed.shape):
        for slot, new in entries(plan.a, at, incoming.a.double()):
            base[at] += torch.outer(b[at][:, slot], a[at][slot] - new) / rank
            magnitude[at] += torch.outer(b[at][:, slot].abs(), a[at][slot].abs() + new.abs()) / rank
            a[at][slot] = new
        for slot, new in entries(plan.b, at, incoming.b.mT.double()):
            base[at] += torch.outer(b[at][:, slot] - new, a[at][slot]) / rank
            magnitude[at] += torch.outer(b[at][:, slot].abs() + new.abs(), a[at][slot].abs()) / rank
            b[at][:, slot] = new
    return LowRank(base, Factors(b, a), param.seed), magnitude


def rounding(param: LowRank, plan: Plan, slow: LowRank, magnitude: Tensor) -> Tensor:
    """Return the bound of the base's rounding errors.

    Each entry of the plan adds a product, of a difference and a quotient, in the working dtype.
    The sum is rounded once to the base's dtype.
    """
    sums = plan.b.slots.shape[-1] + plan.a.slots.shape[-1] + 3
    work = reference.working_dtype(param)
    return sums * eps(work) * magnitude + eps(param.base.dtype) / 2 * slow.base.abs() * (1 + eps(work))


@given(cases)
def test_switch_equals_the_loop_over_slots(case):
    param, plan, seed = case
    incoming = vectors(param, plan, seed)
    got = switch(param, plan, incoming=incoming).param
    slow, magnitude = switched_slowly(param, plan, incoming)
    assert_same(got.factors, tree_map(lambda factor: factor.to(param.factors.a.dtype), slow.factors))
    assert_within(got.base, slow.base, rounding(param, plan, slow, magnitude))


@given(cases)
def test_switch_keeps_the_weight(case):
    param, plan, _ = case
    got = switch(param, plan).param
    slow, magnitude = switched_slowly(param, plan, candidates(param, plan))
    # The comparison itself, in float64, rounds rank products and sums on both sides.
    comparison = 2 * (param.factors.a.shape[-2] + 3) * eps(torch.float64) * (magnitude + reference.magnitude(got))
    assert_within(reference.weight(got), reference.weight(param), rounding(param, plan, slow, magnitude) + comparison)


@given(plain_params(stacks=st.just(())).flatmap(lambda param: st.tuples(st.just(param), plans(param), seeds)))
def test_switch_keeps_the_output_and_the_gradient_of_the_input(case):
    param, plan, seed = case
    dtype, (out_features, in_features) = reference.working_dtype(param), param.base.shape
    x, cotangent = normal(seed, 3, in_features, dtype=dtype), normal(seed + 1, 3, out_features, dtype=dtype)

    def output_and_gradient(param):
        leaf = x.clone().requires_grad_()
        output = linear(leaf, param)
        return output.detach(), torch.autograd.grad(output, leaf, cotangent)[0]

    got = switch(param, plan).param
    slow, magnitude = switched_slowly(param, plan, candidates(param, plan))
    # The error of the base, and the roundings of both products: 2 * length + rank + 4 sums each.
    sums = 2 * max(param.base.shape) + param.factors.a.shape[-2] + 4
    bound = rounding(param, plan, slow, magnitude) + 2 * sums * eps(dtype) * (magnitude + reference.magnitude(got))
    (output, gradient), wanted = output_and_gradient(got), output_and_gradient(param)
    assert_within(output, wanted[0], x.double().abs() @ bound.T)
    assert_within(gradient, wanted[1], cotangent.double().abs() @ bound)


@given(cases)
def test_there_and_back_restores_the_factors_bit_for_bit(case):
    param, plan, seed = case
    there = switch(param, plan, incoming=vectors(param, plan, seed))
    assert_same(switch(there.param, plan, incoming=there.outgoing).param.factors, param.factors)


@given(cases)
def test_what_went_out_is_what_was_in_the_slots(case):
    param, plan, seed = case
    outgoing = switch(param, plan, incoming=vectors(param, plan, seed)).outgoing
    for at in np.ndindex(*param.seed.shape):
        slots = [side.slots.broadcast_to(*param.seed.shape, -1)[at] for side in (plan.b, plan.a)]
        assert_same(outgoing.b[at], param.factors.b[at][:, slots[0]])
        assert_same(outgoing.a[at], param.factors.a[at][slots[1]])


@given(cases)
def test_a_plan_without_active_entries_is_the_identity(case):
    param, plan, seed = case
    sides = [side._replace(active=torch.zeros_like(side.active)) for side in (plan.b, plan.a)]
    idle = Plan(*sides, frozen_for=plan.frozen_for)
    got = switch(param, idle, incoming=vectors(param, plan, seed)).param
    assert_same(got.factors, param.factors)
    assert torch.equal(got.base, param.base)  # in value: the sign of a zero may change


@pytest.mark.parametrize("stack", [(), (3,)])
def test_compiled_equals_eager_without_a_recompile_over_plans(stack):
    param = low_rank(Shape(8, 6, 4), stack, base_dtype=torch.float32, factor_dtype=torch.float32)
    compiled = torch.compile(switch, backend="aot_eager", fullgraph=True)
    first = plan_of(4, b=3, a=2, stack=stack)
    assert_same(compiled(param, first), switch(param, first))
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in range(2, 6):
            plan = plan_of(4, b=3, a=2, stack=stack, seed=seed, frozen_for=seed)
            plan = plan._replace(b=plan.b._replace(active=plan.b.slots < seed))
            assert_same(compiled(param, plan), switch(param, plan))


def side(slots: list[int], active: list[bool]) -> SidePlan:
    return SidePlan(torch.tensor(slots, dtype=torch.int64), torch.arange(len(slots)), torch.tensor(active).bool())


@pytest.mark.parametrize(("active", "entry"), [([True, True], 0), ([False, True], 1)])
def test_of_duplicates_the_first_active_entry_counts(active, entry):
    param, twice, none = low_rank(Shape(5, 6, 3)), side([1, 1], active), side([], [])
    for plan in (Plan(twice, none, torch.tensor(5)), Plan(none, twice, torch.tensor(5))):
        incoming = vectors(param, plan, seed=1)
        got = switch(param, plan, incoming=incoming).param
        if twice is plan.a:
            assert_same(got.factors.a[1], incoming.a[entry])
        else:
            assert_same(got.factors.b[:, 1], incoming.b[:, entry])
        # Two products and the comparison's three, in float64.
        bound = 16 * eps(torch.float64) * (2 * reference.magnitude(param) + reference.magnitude(got))
        assert_within(reference.weight(got), reference.weight(param), bound)


def test_a_base_in_bfloat16_is_rounded_once():
    """The fold adds eight differences of a quarter of an eps. Rounded one by one they vanish, their sum is two eps."""
    ulp = eps(torch.bfloat16)
    factors = Factors(b=torch.ones(8, 8), a=torch.full((8, 8), 8 * ulp / 4))
    param = LowRank(torch.ones(8, 8, dtype=torch.bfloat16), factors, torch.tensor(0))
    plan = plan_of(8, b=0, a=8)
    got = switch(param, plan, incoming=Factors(b=torch.zeros(8, 0), a=torch.zeros(8, 8))).param
    assert_same(got.base, torch.full((8, 8), 1 + 2 * ulp, dtype=torch.bfloat16))


def test_many_vectors_are_folded_as_well_as_few():
    """Beyond 32 vectors the fold is a matrix product."""
    param, plan = low_rank(Shape(50, 45, 40), (2,)), plan_of(40, b=40, a=40)
    incoming = vectors(param, plan, seed=1)
    slow, magnitude = switched_slowly(param, plan, incoming)
    got = switch(param, plan, incoming=incoming).param
    assert_within(got.base, slow.base, rounding(param, plan, slow, magnitude))


def test_autocast_does_not_reach_the_fold():
    param = low_rank(Shape(50, 45, 40), base_dtype=torch.float32, factor_dtype=torch.float32)
    for count in (1, 40):
        plan = plan_of(40, b=count, a=count)
        wanted = switch(param, plan)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same(switch(param, plan), wanted)


@given(cases)
def test_incoming_vectors_are_the_candidates_unless_given(case):
    param, plan, _ = case
    assert_same(switch(param, plan), switch(param, plan, incoming=candidates(param, plan)))
    plain = candidates(param, plan, start="lora")
    assert not plain.b.any()
    assert plain.a.shape == candidates(param, plan).a.shape


def test_candidates_are_the_numbered_vectors_of_the_basis():
    param, plan = low_rank(Shape(5, 6, 3)), plan_of(3, b=2, a=3)
    for name, rows in (("b", candidates(param, plan).b.mT), ("a", candidates(param, plan).a)):
        for row, index in zip(rows, getattr(plan, name).indices.tolist(), strict=True):
            unit = torch.tensor(reference.uniform(param.seed.item(), name, index, len(row)), dtype=torch.float64)
            # The bound is a dozen operations.
            torch.testing.assert_close(row, unit * reference.bound(name, 5, 6, 3), rtol=32 * eps(row.dtype), atol=0)


def test_weights_by_name_are_switched_by_their_own_plans():
    params = {"q": low_rank(Shape(5, 6, 3)), "k": low_rank(Shape(4, 4, 2), seed=1), "norm": normal(0, 6)}
    plan = {"q": plan_of(3, b=1, a=1)}
    got, outgoing = switch(params, plan)
    assert got.keys() == params.keys()
    assert got["k"] is params["k"]
    assert got["norm"] is params["norm"]
    assert_same((got["q"], outgoing["q"]), tuple(switch(params["q"], plan["q"])))
    assert outgoing.keys() == candidates(params, plan).keys() == {"q"}
    incoming = {"q": vectors(params["q"], plan["q"], seed=1)}
    assert_same(switch(params, plan, incoming=incoming).params["q"].factors.a[plan["q"].a.slots], incoming["q"].a)
    assert switch(params, {}).params == params  # the very tensors


@pytest.mark.parametrize(("name", "kind"), [("norm", "a Tensor"), ("v", "not in `params`")])
def test_a_plan_for_what_is_not_low_rank_is_refused(name, kind):
    params = {"q": low_rank(Shape(5, 6, 3)), "norm": normal(0, 6)}
    for function in (switch, candidates):
        with pytest.raises(
            ValueError, match=f"`plan` must be for low-rank parameters, got one for '{name}', .* {kind}"
        ):
            function(params, {name: plan_of(3, b=1, a=1)})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"b": torch.zeros(2, 5, 2)}, r"`incoming\.b` must have shape \(2, 5, 1\) for 'q', got \(2, 5, 2\)"),
        ({"a": torch.zeros(2, 6)}, r"`incoming\.a` must have shape \(2, 2, 6\) for 'q', got \(2, 6\)"),
    ],
)
def test_incoming_vectors_that_do_not_fit_are_refused(changed, message):
    param, plan = low_rank(Shape(5, 6, 3), (2,)), plan_of(3, b=1, a=2)
    incoming = vectors(param, plan, seed=0)._replace(**changed)
    with pytest.raises(ValueError, match=message):
        switch({"q": param}, {"q": plan}, incoming={"q": incoming})


@pytest.mark.parametrize("slots", [torch.tensor([0, 1]), torch.tensor([[0, 1]]), torch.tensor([[0, 0]])], ids=str)
def test_slots_of_a_full_stack_may_be_active_in_some_members(slots: Tensor):
    param = low_rank(Shape(6, 5, 3), (3,))
    active = torch.tensor([[True, False], [False, True], [True, True]])
    side = SidePlan(slots, torch.tensor([5, 6]), active)
    full = SidePlan(slots.expand(3, 2), side.indices.expand(3, 2), active)
    none = side._replace(active=torch.zeros(2, dtype=torch.bool))
    for b, a in ((side, side), (none, side), (side, none)):
        plan = Plan(b, a, torch.tensor(1))
        got = switch(param, plan)
        whole = Plan(
            *(full if each is side else full._replace(active=active & False) for each in (b, a)), plan.frozen_for
        )
        assert_same(got, switch(param, whole))
        assert_within(exact_weight(got.param), exact_weight(param), 1e-14)
