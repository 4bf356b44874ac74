"""What the transforms of a weight promise, each tested with the public checker."""

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

import dynlora_fn as dl
from dynlora_fn import testing
from dynlora_fn.testing import Shape, low_rank, low_rank_params, plan_of, trees
from tests.support.optimizer_table import OPTIMIZERS
from tests.support.strategies import plain_params

# By name: the transform, and the weights that it takes. The default is all of them.
TRANSFORMS: dict[str, tuple[Any, Any]] = {
    "switch": (dl.switch, None),
    "merge": (dl.merge, None),
    "fold_pending": (dl.bases.fold_pending, None),
    "merge by name": (dl.merge, trees()),
    "fold_pending by name": (dl.bases.fold_pending, trees()),
}
# These give a base of another kind.
CONVERSIONS = {
    "defer": (partial(dl.bases.defer, vectors=3), low_rank_params(deferred=False)),
    "quantize by name": (
        lambda params: dl.bases.quantize(params, "int8"),
        trees(weights=low_rank_params(deferred=False)),
    ),
}
ALL = TRANSFORMS | CONVERSIONS


def table(cases: dict[str, tuple[Any, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("transform", "arguments"), cases.values(), ids=cases)


@table(ALL)
def test_the_weight_is_kept(transform, arguments):
    testing.check_preserves_weight(transform, exact_factors=True, arguments=arguments)


@pytest.mark.parametrize("storage", testing.STORAGES, ids=lambda entry: f"{entry.kind}+{entry.residual}")
@pytest.mark.parametrize("transform", [dl.switch, dl.merge])
def test_the_weight_is_kept_on_every_base(transform, storage):
    param = low_rank(Shape(8, 32, 4), (2,), storage=storage, factor_dtype=torch.float32)
    arguments = (param, plan_of(4, b=3, a=2))[: 1 + (transform is dl.switch)]
    testing.check_preserves_weight(transform, exact_factors=True, arguments=arguments)


@table(ALL)
def test_arguments_are_left_alone(transform, arguments):
    testing.check_pure(transform, arguments=arguments)


@table(ALL)
def test_equal_arguments_give_equal_bits(transform, arguments):
    testing.check_deterministic(transform, arguments=arguments)


@table(TRANSFORMS)
def test_structure_shapes_and_dtypes_are_kept(transform, arguments):
    testing.check_keeps_structure(transform, arguments=arguments)


@pytest.mark.parametrize("transform", [dl.switch, dl.merge, dl.bases.fold_pending])
def test_a_stack_is_the_loop_and_the_vmap_over_its_members(transform):
    testing.check_vmap(transform)


@pytest.mark.slow
@pytest.mark.parametrize("transform", [dl.switch, dl.merge, dl.bases.fold_pending])
def test_one_graph_serves_all_plans(transform):
    testing.check_compiles(transform)


@pytest.mark.parametrize("entry", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_only_the_counterparts_start_afresh(entry):
    testing.check_state_projection(dl.project_optimizer_state, optimizer=entry.transform)


@pytest.mark.parametrize("rule", ["keep", "prune", "reset_thawed"])
def test_no_rule_reaches_beyond_the_counterparts(rule):
    testing.check_state_projection(partial(dl.project_optimizer_state, rule=rule), is_reset=False)


def training() -> tuple[Any, Any]:
    """Return the initial state and the step of a run that switches."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 6))
    weights = {
        name: testing.normal(len(name), *weight.shape, dtype=weight.dtype) for name, weight in model.named_parameters()
    }
    params = dl.init(model, weights=weights, rank=4, seed=0, targets=["*.weight"], base="int8")
    optimizer, schedule = dl.optim.adamw(), dl.schedules.Schedule(interval=2, freeze=1)

    def step(state: Any, index: int) -> tuple[Any, Any]:
        trainable, frozen, opt_state = state
        batch = testing.normal(index, 5, 6, dtype=torch.float32)

        def loss_fn(trainable: Any) -> torch.Tensor:
            return (dl.call(model, dl.combine(trainable, frozen), batch) - batch).square().mean()

        loss, grads = dl.value_and_grad(loss_fn)(trainable)
        params = dl.combine(trainable, frozen)
        plan = schedule(index, params)
        params, _ = dl.switch(params, plan)
        opt_state = dl.project_optimizer_state(opt_state, plan)
        trainable, frozen = dl.partition(params)
        updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=1e-2)
        return (dl.apply_updates(trainable, updates), frozen, opt_state), loss

    trainable, frozen = dl.partition(params)
    return (trainable, frozen, optimizer.init(trainable)), step


def test_a_run_goes_on_where_it_was_broken_off():
    testing.check_resumes(training)


def test_schedules_are_functions_of_the_step():
    """Plans are equal for integer and tensor steps, and do not depend on earlier calls."""
    cases = st.tuples(testing.schedules(), plain_params(), st.integers(0, 400))

    def plans(case: Any) -> Any:
        schedule, param, step = case
        by_number, by_tensor = schedule(step, {"w": param}), schedule(torch.tensor(step), {"w": param})
        testing.assert_same(by_tensor, by_number)
        testing.assert_same(dataclasses.replace(schedule)(step, {"w": param}), by_number)
        return by_number or {"none": torch.tensor(0)}

    testing.check_deterministic(plans, arguments=cases.map(lambda case: (_Case(case),)))


class _Case(tuple):
    """Counts as one argument."""

    _fields = ()
