"""The kit itself: bugs that are planted are found and made small, and strategies leave no edge out."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample
from torch.utils._pytree import tree_leaves, tree_map

import dynlora_fn as dl
from dynlora_fn import LowRank, Plan, testing
from dynlora_fn.testing import BrokenPromiseError, Shape, low_rank, low_rank_params, plans, trees

MANY = settings(max_examples=500, database=None, derandomize=True, phases=[Phase.generate])


# --- planted bugs


def wrong_slot(param: LowRank, plan: Plan) -> LowRank:
    """Folds the differences of side a into the base by way of the next slot's counterpart."""
    rank = param.factors.a.shape[-2]
    new, outgoing = dl.switch(param, plan)
    incoming = dl.candidates(param, plan)
    difference = torch.where(plan.a.active[..., None], outgoing.a - incoming.a, 0)
    stack = param.shape[:-2]
    columns = [side.expand(*stack, -1)[..., None, :] for side in (plan.a.slots, (plan.a.slots + 1) % rank)]
    right, wrong = (param.factors.b.gather(-1, one.expand(*param.shape[:-1], -1)) for one in columns)
    return new._replace(base=new.base + (wrong - right) @ difference / rank)


def in_place(param: LowRank) -> LowRank:
    param.factors.b.zero_()
    return param


def drawn(param: LowRank) -> LowRank:
    return param._replace(factors=tree_map(torch.randn_like, param.factors))


def rounded(param: LowRank) -> LowRank:
    return param._replace(factors=tree_map(lambda leaf: leaf.float(), param.factors))


def by_value(param: LowRank) -> LowRank:
    return dl.merge(param) if param.factors.b.sum() > 0 else param


class Counting:
    """Each call is another."""

    calls = 0

    def __call__(self, param: LowRank) -> LowRank:
        self.calls += 1
        return param._replace(factors=tree_map(lambda leaf: leaf + self.calls, param.factors))


def over_the_stack(param: LowRank) -> LowRank:
    return param._replace(factors=tree_map(lambda leaf: leaf - leaf.mean(), param.factors))


def plain(**settings: Any) -> st.SearchStrategy[LowRank]:
    return low_rank_params(storages=testing.PLAIN[:1], factor_dtypes=st.just(torch.float64), deferred=False, **settings)


def with_plan() -> st.SearchStrategy[Any]:
    return plain().flatmap(lambda param: st.tuples(st.just(param), plans(param)))


# By name: a checker, a transform that breaks its promise, and what it says of it.
BUGS = {
    "weight": (testing.check_preserves_weight, lambda param: param._replace(base=param.base + 1e-9), "off by up to"),
    "scale": (testing.check_preserves_weight, lambda param: dl.merge(param)._replace(factors=param.factors), "off by"),
    "in place": (testing.check_pure, in_place, r"factors\.b has been written into"),
    "global generator": (testing.check_pure, drawn, "a random number was drawn from torch's global generator"),
    "dtype": (testing.check_keeps_structure, rounded, r"\.factors\.b is .*float32.* instead of .*float64"),
    "gradient": (
        testing.check_keeps_structure,
        lambda param: param._replace(base=param.base.clone().requires_grad_()),
        r"\.base now requires a gradient",
    ),
    "random": (testing.check_deterministic, drawn, r"factors\.b: .* is not"),
    "control flow": (testing.check_compiles, by_value, "Data-dependent|data-dependent|recompile"),
    "recompile": (testing.check_compiles, Counting(), r"recompile|\.factors\.b"),
    "stack": (testing.check_vmap, over_the_stack, r"factors\.b: "),
    "raises": (testing.check_preserves_weight, lambda param: 1 / 0, "ZeroDivisionError: division by zero"),
    "nothing": (
        testing.check_preserves_weight,
        lambda param: None,
        "TypeError: `transform` returns NoneType; return the new weight",
    ),
}


@pytest.mark.parametrize(("check", "transform", "said"), BUGS.values(), ids=BUGS)
def test_bugs_are_found_and_told(check, transform, said):
    arguments = plain() if check is not testing.check_vmap else plain(stacks=st.just((2,)))
    with pytest.raises(BrokenPromiseError) as caught:
        check(transform, arguments=arguments)
    message = str(caught.value)
    assert re.search(r"promised: .*\nhappened: .*\n(.*\n)*smallest example: ", message), message
    assert re.search(said, message), message
    assert re.search(r"arguments=\(?(low_rank|LowRank)\(", message), message


def test_a_wrong_slot_shrinks_to_two_slots():
    """Of weights up to 8 x 8 with plans for all of their slots: the smallest that has two slots to confuse."""
    with pytest.raises(BrokenPromiseError) as caught:
        testing.check_preserves_weight(wrong_slot, arguments=with_plan(), examples=200)
    message = str(caught.value)
    assert "promised: the weight is kept" in message
    assert "Shape(out_features=2, in_features=2, rank=2)" in message
    assert re.search(r"a=side_plan\(2, [12], \(\), 0, share_active=1\.0\)", message), message


def switched_side(opt_state: Any, plan: Any) -> Any:
    """Resets the switched vectors themselves instead of their counterparts."""
    return dl.project_optimizer_state(
        opt_state, {name: Plan(b=own.a, a=own.b, frozen_for=own.frozen_for) for name, own in plan.items()}
    )


def no_moments(opt_state: Any, plan: Any) -> Any:
    new = dl.project_optimizer_state(opt_state, plan)
    return new._replace(mu=opt_state.mu)


def one_too_many(opt_state: Any, plan: Any) -> Any:
    new = dl.project_optimizer_state(opt_state, plan)
    return new._replace(count={**new.count, "bias": torch.zeros_like(new.count["bias"])})


@pytest.mark.parametrize(
    ("project", "said"),
    [
        (
            switched_side,
            r"slot 0 (is the counterpart of a switched vector and holds|has changed and is no counterpart)",
        ),
        (no_moments, r"\.mu\['w'\]\.[ba], slot 0 is the counterpart of a switched vector and holds"),
        (one_too_many, r"\.count\['bias'\] has changed and belongs to no counterpart"),
        (lambda opt_state, plan: opt_state._replace(nu=opt_state.mu), "has changed|is not"),
        (lambda opt_state, plan: opt_state.mu, "the structure is .*(.|\\n)* instead of"),
    ],
    ids=["switched side", "moments", "bias", "nu", "structure"],
)
def test_projections_that_miss_are_found(project, said):
    with pytest.raises(BrokenPromiseError, match=said):
        testing.check_state_projection(project, examples=100)


def test_what_a_step_keeps_to_itself_is_lost_at_a_restart():
    def make():
        seen = []

        def step(state, number):
            seen.append(number)
            return state + len(seen), state

        return torch.zeros(()), step

    with pytest.raises(
        BrokenPromiseError, match=r"broken off after 1 steps(.|\n)*smallest example: .*\n.*arguments=\(1,\)"
    ):
        testing.check_resumes(make)


def test_a_state_that_is_not_saved_whole_is_found():
    def make():
        return torch.zeros(()), lambda state, number: (state + 1, None)

    with pytest.raises(BrokenPromiseError, match="is not"):
        testing.check_resumes(make, save=lambda state: None, load=lambda saved, template: template)


@pytest.mark.parametrize("transform", [lambda: None, lambda param, plan, other: None])
def test_what_takes_other_arguments_is_refused(transform):
    with pytest.raises(
        TypeError, match=r"`transform` has [03] arguments without a default; take a weight, or a weight and a plan"
    ):
        testing.check_pure(transform)


def test_given_arguments_are_summed_up():
    with pytest.raises(BrokenPromiseError, match=r"smallest example: \(LowRank\(base='\(8, 4\) float64', .*\),\)"):
        testing.check_preserves_weight(
            lambda param: param._replace(base=param.base + 1), arguments=low_rank(Shape(8, 4, 3))
        )


# --- strategies


def occurs(strategy: st.SearchStrategy[Any], condition: Any) -> bool:
    try:
        find(strategy, condition, settings=MANY)
    except NoSuchExample:
        return False
    return True


def storage_of(param: LowRank) -> tuple[str, str]:
    base = param.base.base if isinstance(param.base, dl.bases.Deferred) else param.base
    if isinstance(base, torch.Tensor):
        return str(base.dtype), ""
    codes = "bfloat16" if isinstance(base.codes, torch.Tensor) else type(base.codes).__name__
    return codes, str([leaf.dtype for leaf in tree_leaves(base.residual)])


def test_weights_of_every_kind_occur():
    seen: dict[str, set[Any]] = {"storage": set(), "stack": set(), "dtype": set(), "deferred": set(), "edges": set()}

    @settings(MANY, max_examples=1200)
    @given(low_rank_params())
    def look(param):
        out_features, in_features = param.shape[-2:]
        rank = param.factors.a.shape[-2]
        seen["storage"].add(storage_of(param))
        seen["stack"].add(tuple(param.seed.shape))
        seen["dtype"].add(param.factors.b.dtype)
        seen["deferred"].add(isinstance(param.base, dl.bases.Deferred))
        seen["edges"] |= {rank == 1 < min(param.shape[-2:]), rank == min(param.shape[-2:]), out_features > in_features}
        assert param.factors.b.shape == (*param.shape[:-1], rank)

    look()
    assert len(seen["storage"]) == len(testing.STORAGES)
    assert seen["stack"] == {(), (1,), (3,), (2, 3)}
    assert seen["dtype"] == {torch.float64, torch.float32, torch.bfloat16}
    assert seen["deferred"] == seen["edges"] == {True, False}


PARAM = low_rank(Shape(4, 5, 3), (2,))


@pytest.mark.parametrize(
    "condition",
    [
        lambda plan: plan.b.slots.shape[-1] == 0,
        lambda plan: plan.a.slots.shape == (2, 3) and bool(plan.a.active.all()),
        lambda plan: plan.a.slots.shape == (3,) and not plan.a.active.any(),
        lambda plan: plan.b.active.any() and not plan.b.active.all(),
        lambda plan: plan.b is plan.a,
        lambda plan: plan.frozen_for == 0,
    ],
)
def test_the_edges_of_plans_occur(condition):
    assert occurs(plans(PARAM), condition)


@given(st.data())
def test_plans_by_name_are_for_low_rank_weights_alone(data):
    params = data.draw(trees())
    plan = data.draw(plans(params))
    assert plan.keys() <= {name for name, param in params.items() if isinstance(param, LowRank)}
    dl.switch(params, plan)
    dl.partition(params)
    for name, param in params.items():
        if isinstance(param, LowRank):
            assert name.count("*") == param.seed.ndim


@given(testing.schedules(), low_rank_params(storages=testing.PLAIN[:1]), st.integers(0, 10**4))
def test_schedules_hold_for_every_weight(schedule, param, step):
    schedule(step, {"w": param})


def test_schedules_of_every_kind_occur():
    assert occurs(testing.schedules(), lambda schedule: schedule.count == "all" and schedule.every == 5)
    assert occurs(testing.schedules(), lambda schedule: schedule.interval == float("inf") and schedule.count is None)
    assert occurs(testing.schedules(), lambda schedule: schedule.interval == 2 * schedule.freeze > 0)
    assert not occurs(testing.schedules(kinds=["rate"]), lambda schedule: schedule.count is not None)


@given(st.data())
def test_states_are_those_of_the_parameters(data):
    params = data.draw(trees())
    state = data.draw(testing.optimizer_states(params))
    wanted = dl.optim.adamw().init(dl.partition(params).trainable)
    kinds = [tree_map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (state, wanted)]
    assert kinds[0] == kinds[1]


def test_states_before_and_after_updates_occur():
    states = testing.optimizer_states({"w": PARAM})
    for condition in (
        lambda state: not any(leaf.any() for leaf in tree_leaves(state)),
        lambda state: all(leaf.all() for leaf in tree_leaves(state.mu)),
        lambda state: state.frozen_for["w"].b.any(),
        lambda state: (state.count["w"].b == 1).all(),
    ):
        assert occurs(states, condition)


def test_batches_have_any_leading_axes():
    for shape in [(6,), (1, 6), (8, 8, 6)]:
        assert occurs(testing.batches(6), lambda batch: batch.shape == shape)  # noqa: B023, at once


def test_examples_are_the_calls_that_make_them():
    for strategy, wanted in (
        (low_rank_params(), r"Shape\(out_features=1, in_features=1, rank=1\)"),
        (plans(PARAM), r"b=side_plan\(3, 0, \(\), 0, share_active=1.0\)"),
        (testing.optimizer_states({"w": low_rank(Shape(1, 1, 1))}), "optimizer_state"),
        (testing.batches(6), r"normal\(0, 6, dtype=torch.float64\)"),
    ):

        @settings(MANY, max_examples=1)
        @given(strategy)
        def fail(value):
            raise AssertionError

        with pytest.raises(AssertionError) as caught:
            fail()
        assert re.search(wanted, "".join(caught.value.__notes__)), caught.value.__notes__


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: testing.shapes(largest=0), "`largest` is 0; use at least 1"),
        (lambda: low_rank_params(storages=[]), "`storages` is empty; pass at least one"),
        (
            lambda: low_rank_params(shapes=st.just(Shape(3, 3, 1)), storages=[testing.Storage("nf4")]),
            "`storages` has none whose blocks divide Shape",
        ),
        (lambda: testing.schedules(kinds=["daily"]), r"`kinds` has \['daily'\]; use some of "),
        (lambda: trees(largest=-1), "`largest` is -1; use at least 0"),
        (lambda: testing.optimizer_states({}, most_steps=-1), "`most_steps` is -1; use at least 0"),
        (lambda: testing.batches(0), "`features` is 0 and `largest` is 8; use at least 1"),
    ],
)
def test_bad_arguments_raise_when_an_example_is_drawn(make, message):
    strategy = make()

    @settings(MANY)
    @given(strategy)
    def draw(value):
        pass

    with pytest.raises(ValueError, match=message):
        draw()


# --- comparisons


def test_bits_kinds_and_structures_are_compared():
    one = {"w": torch.tensor([0.0, 1.0])}
    testing.assert_same(one, {"w": torch.tensor([0.0, 1.0])})
    for other in (
        {"w": torch.tensor([-0.0, 1.0])},
        {"w": torch.tensor([0.0, 1.0], dtype=torch.float64)},
        {"w": torch.tensor([[0.0, 1.0]])},
        {"v": torch.tensor([0.0, 1.0])},
        {"w": 1},
    ):
        with pytest.raises(AssertionError):
            testing.assert_same(other, one)
    testing.assert_same(torch.zeros(8, 3).T[:, :1], torch.zeros(3, 1))


def test_a_bound_is_a_bound():
    testing.assert_within(torch.tensor([1.0]), torch.tensor([1.5]), 0.5)
    for got, bound in (([1.0], 0.49), ([float("nan")], 1.0), ([1.0, 2.0], 1.0)):
        with pytest.raises(AssertionError):
            testing.assert_within(torch.tensor(got), torch.tensor([1.5]), bound)


def test_what_is_written_into_is_named():
    tree = {"w": torch.zeros(2)}
    with pytest.raises(AssertionError, match=r"\['w'\] has been written into"), testing.untouched(tree):
        tree["w"].add_(0)


def test_the_bound_on_roundings_is_not_wide():
    """A unit in the last place more than is rounded is found, on plain bases and in codes with a residual."""
    for storage, share in ((testing.Storage("float32"), 1e-5), (testing.Storage("int8", "bfloat16"), 1e-4)):
        param = low_rank(Shape(8, 8, 2), storage=storage, factor_dtype=torch.float32)
        merged = dl.merge(param)
        size = testing.exact_weight(param).abs().max()
        assert testing.rounding(param, merged).max() < share * size


# --- the extra


def test_without_hypothesis_the_extra_is_named():
    script = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "import dynlora_fn\n"
        "try: import dynlora_fn.testing\n"
        "except ImportError as error: assert \"pip install 'dynlora-fn[testing]'\" in str(error), error\n"
        "else: raise SystemExit('no error')"
    )
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent.parent, check=True)
