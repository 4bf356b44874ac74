"""Strategies leave no edge out."""

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample
from torch.utils._pytree import tree_leaves, tree_map

import dynlora_fn as dl
from dynlora_fn import LowRank, testing
from dynlora_fn.testing import Shape, low_rank, low_rank_params, plans, trees
from tests.support.paths import ROOT

MANY = settings(max_examples=500, database=None, derandomize=True, phases=[Phase.generate])


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


@pytest.mark.slow
def test_weights_of_every_kind_occur():
    found: dict[str, set[Any]] = {"storage": set(), "stack": set(), "dtype": set(), "deferred": set(), "edges": set()}

    @settings(MANY, max_examples=1200)
    @given(low_rank_params())
    def look(param):
        out_features, in_features = param.shape[-2:]
        rank = param.factors.a.shape[-2]
        found["storage"].add(storage_of(param))
        found["stack"].add(tuple(param.seed.shape))
        found["dtype"].add(param.factors.b.dtype)
        found["deferred"].add(isinstance(param.base, dl.bases.Deferred))
        found["edges"] |= {rank == 1 < min(param.shape[-2:]), rank == min(param.shape[-2:]), out_features > in_features}
        assert param.factors.b.shape == (*param.shape[:-1], rank)

    look()
    assert len(found["storage"]) == len(testing.STORAGES)
    assert found["stack"] == {(), (1,), (3,), (2, 3)}
    assert found["dtype"] == {torch.float64, torch.float32, torch.bfloat16}
    assert found["deferred"] == found["edges"] == {True, False}


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


@pytest.mark.slow
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
        lambda state: all(leaf.all() for leaf in tree_leaves(state.inner.mu)),
        lambda state: state.frozen_for["w"].b.any(),
        lambda state: (state.inner.count["w"].b == 1).all(),
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


@pytest.mark.slow
def test_without_hypothesis_the_extra_is_named():
    script = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "import dynlora_fn\n"
        "try: import dynlora_fn.testing\n"
        "except ImportError as error: assert \"pip install 'dynlora-fn[testing]'\" in str(error), error\n"
        "else: raise SystemExit('no error')"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
