"""Roles of optimizer state are declared by field: names of parameters and labels mean nothing, containers stay."""

from typing import Any, get_args

import pytest
import torch
from torch.utils._pytree import tree_map

from dynlora_fn import Factors, partition, project_optimizer_state, switch
from dynlora_fn._core._types import ShardedFactors, Sharding
from dynlora_fn.optim import AdamWState, Change, FreezeState, adamw, multi_transform, register_state, sgd
from dynlora_fn.optim._project_factors import Rule
from dynlora_fn.testing import Shape, assert_same, low_rank, normal
from tests.support.optimizer_states import SWITCH, Record, filled, per_vector, updated_state
from tests.support.optimizers import one_switch

NAMES = ["mu", "m", "trace", "frozen_for", "count", "nu", "exp_avg", "momentum_buffer", "inner", "step", "state"]
PARAM = low_rank(Shape(5, 6, 4))
TRAINABLE = {"w": PARAM.factors, "bias": normal(1, 5)}
PLAN = one_switch(**SWITCH)
ROLES = {"mean": "first_moment", "square": "second_moment", "seen": "count", "shared": "unchanged"}


def settings_of(rule: str, name: str) -> dict[str, Any]:
    """Return the arguments of a projection of one weight."""
    plan = {name: PLAN["w"]}
    params = {name: PARAM}
    change = Change(params, switch(params, plan).params) if rule == "transport" else None
    return {"plan": plan, "rule": rule, "change": change}


def renamed(tree: Any, name: str) -> Any:
    """Return a state with another name in place of 'w' in the dicts by parameter name."""
    if isinstance(tree, dict):
        return {name if key == "w" else key: renamed(leaf, name) for key, leaf in tree.items()}
    is_record = isinstance(tree, FreezeState | AdamWState)
    return type(tree)(*(renamed(leaf, name) for leaf in tree)) if is_record else tree


@pytest.mark.parametrize("rule", get_args(Rule))
@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_parameter_means_nothing(name: str, rule: str):
    state = updated_state(adamw())(TRAINABLE)
    wanted = project_optimizer_state(state, **settings_of(rule, "w"))
    assert_same(project_optimizer_state(renamed(state, name), **settings_of(rule, name)), renamed(wanted, name))


@pytest.mark.parametrize("rule", get_args(Rule))
@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_parameter_means_nothing_in_a_state_of_dicts(name: str, rule: str):
    roles = dict.fromkeys(NAMES, "second_moment") | {"mean": "first_moment"}
    state = {"mean": filled({"w": TRAINABLE["w"]}, 1), "nu": filled({"w": TRAINABLE["w"]}, 2)}
    wanted = project_optimizer_state(state, **settings_of(rule, "w"), roles=roles)
    got = project_optimizer_state(renamed(state, name), **settings_of(rule, name), roles=roles)
    assert_same(got, renamed(wanted, name))


@pytest.mark.parametrize("rule", get_args(Rule))
@pytest.mark.parametrize("label", NAMES)
def test_a_label_means_nothing(label: str, rule: str):
    optimizer = multi_transform({label: adamw(), "rest": sgd()}, lambda name, leaf: label if name == "w" else "rest")
    state = updated_state(optimizer)(TRAINABLE)
    new = project_optimizer_state(state, **settings_of(rule, "w"))
    assert_same(new[label], project_optimizer_state(state[label], **settings_of(rule, "w")))
    assert_same(new["rest"], state["rest"])


@pytest.mark.parametrize("label", ["mean", "square", "seen", "shared"])
def test_a_label_is_not_taken_for_a_field_of_roles(label: str):
    state = {label: {"mean": filled(TRAINABLE), "shared": {"rows": normal(0, 5, 1)}, "step": torch.tensor(3)}}
    new = project_optimizer_state(state, PLAN, roles=ROLES)
    assert not new[label]["mean"]["w"].b[:, 2].any()
    assert_same(new[label]["shared"], state[label]["shared"])


def test_statistics_of_vectors_are_reset_and_shared_ones_stay():
    """The state of an Adafactor whose fields have one role for both sides."""
    vectors = Factors(torch.ones(1, 4), torch.ones(4, 1))
    shared = Factors(torch.ones(5, 1), torch.ones(1, 6))
    state = {"square": {"w": vectors}, "shared": {"w": shared}}
    new = project_optimizer_state(state, PLAN, roles=ROLES, trainable=TRAINABLE)
    assert new["square"]["w"].b.tolist() == [[1, 1, 0, 1]]
    assert new["square"]["w"].a.flatten().tolist() == [0, 1, 1, 0]
    assert_same(new["shared"], state["shared"])


def test_second_moments_are_pruned_only_where_every_first_moment_is():
    tree = {"w": TRAINABLE["w"]}
    fields = {"mean": filled(tree, 0), "trend": filled(tree, 1), "square": filled(tree, 2)}
    roles = {**ROLES, "trend": "first_moment"}
    plan = one_switch(b=[0, 1, 2, 3], a=[0, 1, 2, 3], frozen_for=0)
    new = project_optimizer_state(fields, plan, rule="prune", prune=0.8, roles=roles)
    gone = {name: new[name]["w"].b == 0 for name in fields}
    assert gone["square"].any()
    assert not (gone["square"] & ~(gone["mean"] & gone["trend"])).any()


def test_second_moments_of_vectors_are_not_pruned():
    tree = {"w": TRAINABLE["w"]}
    squares = tree_map(torch.Tensor.double, per_vector(tree))
    fields = {"mean": filled(tree), "square": squares}
    plan = one_switch(b=[0, 1, 2, 3], a=[0, 1, 2, 3], frozen_for=0)
    new = project_optimizer_state(fields, plan, rule="prune", prune=0.8, roles=ROLES)
    assert (new["mean"]["w"].b == 0).any()
    assert_same(new["square"], squares)


@pytest.mark.parametrize("rule", ["prune", "transport"])
def test_rules_that_need_all_entries_are_refused_for_shards(rule: str):
    sharding = Sharding(group="0", world_size=2, process=0, rows=10, columns=12)
    state = {"mean": {"w": ShardedFactors(*TRAINABLE["w"], sharding)}}
    with pytest.raises(ValueError, match=f"`rule` must not be '{rule}' for sharded factors, got them for 'w'"):
        project_optimizer_state(state, **settings_of(rule, "w"), roles=ROLES)


def test_transport_needs_the_weight_before_and_after():
    state, change = {"mean": filled(TRAINABLE)}, Change({}, {"w": PARAM})
    with pytest.raises(ValueError, match=r"`change` must have the low-rank weight 'w' .* got NoneType and LowRank"):
        project_optimizer_state(state, PLAN, rule="transport", change=change, roles=ROLES)
    with pytest.raises(ValueError, match=r"`change\.after` must be by parameter name"):
        project_optimizer_state(state, PLAN, rule="transport", change=Change({"w": PARAM}, [PARAM]), roles=ROLES)


def test_a_role_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"`roles` must be some of first_moment, .* got 'moment' for 'mean'"):
        project_optimizer_state({"mean": filled(TRAINABLE)}, PLAN, roles={"mean": "moment"})
    with pytest.raises(ValueError, match=r"`roles` of Record must be some of .* got 'mean' for 'velocity'"):
        register_state(Record, {"velocity": "mean"})


def test_register_state_refuses():
    with pytest.raises(
        ValueError, match=r"`roles` names \['speed'\], but the fields of Record are \['other', 'velocity'\]"
    ):
        register_state(Record, {"speed": "first_moment"})
    with pytest.raises(ValueError, match=r"Record is registered with the roles .*; register it once"):
        register_state(Record, {"velocity": "count"})
    register_state(Record, {"velocity": "first_moment"})


def test_a_count_may_start_at_the_thaw():
    counts = per_vector(TRAINABLE)
    new = project_optimizer_state({"seen": counts}, PLAN, rule="reset_thawed", roles=ROLES)
    assert new["seen"]["w"].b.tolist() == [[7, 7, -5, 7]]


def test_parameters_called_as_fields_are_projected():
    trainable = partition({"mu": PARAM, "nu": normal(0, 3)}).trainable
    state = tree_map(lambda leaf: leaf + 1, adamw().init(trainable))
    new = project_optimizer_state(state, {"mu": PLAN["w"]})
    assert not new.inner.mu["mu"].b[:, 2].any()
    assert_same(new.inner.nu["nu"], state.inner.nu["nu"])
