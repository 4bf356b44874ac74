"""What a switch does to the state of an optimizer: the counterparts are reset, and nothing else changes."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dynlora_fn import Factors, Plan, partition, project_optimizer_state
from dynlora_fn.optim import AdamWState, FreezeState
from dynlora_fn.testing import assert_same, low_rank_params, normal, plans, untouched
from tests.support.optimizer_states import adamw_state, filled, per_vector
from tests.support.optimizers import one_switch, some_trainable


class Momentum(NamedTuple):
    """The state of stochastic gradient descent."""

    velocity: dict[str, Any]
    decay: float
    step: Tensor
    roles = {"velocity": "first_moment"}  # noqa: RUF012, an annotation would make it a field


# By name: a state as a function of the trainable parameters, and the roles of fields that no type declares.
STATES = {
    "adamw": (adamw_state, {}),
    "momentum": (lambda trainable: Momentum(filled(trainable), 0.9, torch.tensor(3)), {}),
    "plain dict": (lambda trainable: {"mean": filled(trainable)}, {"mean": "first_moment"}),
    "nested": (
        lambda trainable: [
            {"inner": ({"mean": filled(trainable)}, [{"seen": per_vector(trainable)}], None)},
            (1, "name", Momentum(filled(trainable), 0.9, torch.tensor(1))),
        ],
        {"mean": "second_moment", "seen": "count"},
    ),
    "frozen_for in a dict": (
        lambda trainable: {"frozen_for": per_vector(trainable), "mu": filled(trainable)},
        {"frozen_for": "frozen_for", "mu": "first_moment"},
    ),
}


def reset_slowly(leaf: Factors, plan: Plan, value: int) -> Factors:
    """Set the counterparts of the switched slots one by one."""
    b, a = (factor.clone() for factor in leaf)
    for at in np.ndindex(*b.shape[:-2]):
        for side, vectors in ((plan.a, b[at].mT), (plan.b, a[at])):
            slots, active = (index.broadcast_to(*b.shape[:-2], -1)[at].tolist() for index in (side.slots, side.active))
            for slot, is_active in zip(slots, active, strict=True):
                if is_active:
                    vectors[slot] = value
    return Factors(b, a)


def projected_slowly(state: Any, plan: dict[str, Plan], field: str = "") -> Any:
    if isinstance(state, dict):
        return {
            key: reset_slowly(leaf, plan[key], int(plan[key].frozen_for) if field == "frozen_for" else 0)
            if isinstance(leaf, Factors) and key in plan
            else projected_slowly(leaf, plan, key)
            for key, leaf in state.items()
        }
    if isinstance(state, FreezeState | AdamWState | Momentum):
        return type(state)(**projected_slowly(state._asdict(), plan))
    if type(state) in (tuple, list):
        return type(state)(projected_slowly(leaf, plan) for leaf in state)
    return state


@pytest.mark.parametrize(("make", "roles"), STATES.values(), ids=STATES)
@given(data=st.data())
def test_only_the_counterparts_start_afresh(make, roles, data):
    weights = {name: data.draw(low_rank_params(), name) for name in ("w", "other", "third")}
    plan = {name: data.draw(plans(weights[name]), f"plan of {name}") for name in ("w", "third")}
    trainable = partition({**weights, "bias": normal(0, 3)}).trainable
    state = make(trainable)
    with untouched(state, plan):
        got = project_optimizer_state(state, plan, roles=roles, trainable=trainable)
    assert_same(got, projected_slowly(state, plan))
    assert_same(project_optimizer_state(state, {}, roles=roles), state)


def test_the_switched_vector_keeps_its_state():
    """Switching side a resets b, not a."""
    trainable = some_trainable()
    state = project_optimizer_state(adamw_state(trainable), one_switch(b=[], a=[2], frozen_for=5))
    assert not state.inner.mu["w"].b[:, 2].any()
    assert state.inner.mu["w"].b[:, [0, 1, 3]].all()
    assert state.inner.mu["w"].a.all()
    assert state.inner.count["w"].b.flatten().tolist() == [7, 7, 0, 7]
    assert state.frozen_for["w"].b.flatten().tolist() == [7, 7, 5, 7]


def test_a_plan_that_the_state_has_no_factors_for_is_refused():
    trainable = some_trainable()
    plan = one_switch(b=[0], a=[1], frozen_for=5)
    with pytest.raises(ValueError, match=r"`opt_state` must have the factors of every planned parameter.*\['v'\]"):
        project_optimizer_state(adamw_state(trainable), {**plan, "v": plan["w"]})
    with pytest.raises(ValueError, match=r"`opt_state` must have .*\['bias'\]"):
        project_optimizer_state(adamw_state(trainable), {"bias": plan["w"]})
    with pytest.raises(ValueError, match="`plan` must be by parameter name"):
        project_optimizer_state(adamw_state(trainable), plan["w"])
