"""Roles of optimizer state are declared by field: names of parameters and labels mean nothing, containers stay."""

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass, tree_map

from dynlora_fn import Factors, partition, project_optimizer_state, switch
from dynlora_fn._core._types import ShardedFactors, Sharding
from dynlora_fn.optim import AdamWState, Change, FreezeState, adamw, multi_transform, register_state, sgd
from dynlora_fn.optim._project_factors import Rule
from dynlora_fn.testing import Shape, assert_same, low_rank, normal
from tests.support.optimizer_states import SWITCH, filled, per_vector, updated_state
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


@dataclass
class Plain:
    velocity: Any
    note: str = "free"
    roles = {"velocity": "first_moment"}  # noqa: RUF012, an annotation would make it a field


@dataclass(frozen=True)
class Frozen:
    velocity: Any
    steps: int = field(default=3, init=False)
    roles = {"velocity": "first_moment"}  # noqa: RUF012


@dataclass(slots=True)
class Slots:
    velocity: Any


@dataclass
class Registered:
    velocity: Any


class Record(NamedTuple):
    velocity: Any
    other: Any = None


class Subclassed(dict):
    """A dict with an attribute."""

    label = "none"


register_dataclass(Registered)
for kind in (Slots, Registered, Record):
    register_state(kind, {"velocity": "first_moment"})


def dict_of(kind: Callable[[Any], Any]) -> Any:
    return lambda tree: {"mean": kind(tree)}


CONTAINERS = {
    "dataclass": Plain,
    "frozen dataclass": Frozen,
    "dataclass with slots": Slots,
    "registered dataclass": Registered,
    "NamedTuple": Record,
    "OrderedDict": dict_of(OrderedDict),
    "defaultdict": dict_of(partial(defaultdict, list)),
    "subclass of dict": dict_of(Subclassed),
    "dict of dicts": lambda tree: {"deep": {"deeper": {"mean": tree}}},
    "list": lambda tree: [Plain(tree), None, 2],
    "tuple": lambda tree: (Record(tree), "text", torch.tensor(1.0)),
    "deque": lambda tree: deque([Record(tree), torch.ones(3)], maxlen=2),
    "history in a declared field": lambda tree: Record((tree, [tree])),
    "shape": lambda tree: (Record(tree), torch.Size([2, 3]), torch.float32, torch.device("cpu"), sum),
}


def velocities(node: Any) -> list[Any]:
    """Return the dicts by parameter name, wherever they are."""
    if isinstance(node, dict) and "w" in node:
        return [node]
    inside = node.values() if isinstance(node, dict) else node if isinstance(node, tuple | list | deque) else []
    attributes = [node.velocity] if hasattr(node, "velocity") else []
    return [found for child in (attributes or inside) for found in velocities(child)]


def kinds(node: Any) -> Any:
    """Return the types of all nodes."""
    children = node.values() if isinstance(node, dict) else node if isinstance(node, tuple | list | deque) else []
    attributes = [node.velocity] if hasattr(node, "velocity") else []
    return type(node), [kinds(child) for child in (*children, *attributes) if not isinstance(child, Tensor)]


@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS)
def test_containers_keep_their_types_and_other_contents(make: Any):
    state = make(filled(TRAINABLE))
    new = project_optimizer_state(state, PLAN, roles=ROLES)
    assert kinds(new) == kinds(state)
    wanted = project_optimizer_state({"mean": filled(TRAINABLE)}, PLAN, roles=ROLES)["mean"]
    assert len(velocities(new)) == len(velocities(state)) > 0
    for got, old in zip(velocities(new), velocities(state), strict=True):
        assert_same(dict(got), wanted)
        assert_same(dict(old), filled(TRAINABLE))


def test_what_else_a_container_has_is_kept():
    tree = filled(TRAINABLE)
    note = project_optimizer_state(Plain(tree, "mine"), PLAN).note
    steps = project_optimizer_state(Frozen(tree), PLAN).steps
    history = project_optimizer_state(deque([Record(tree)], maxlen=3), PLAN)
    groups = project_optimizer_state({"mean": defaultdict(list, tree)}, PLAN, roles=ROLES)["mean"]
    assert (note, steps, history.maxlen, groups.default_factory) == ("mine", 3, 3, list)
    named = Subclassed(tree)
    named.label = "mine"
    assert project_optimizer_state({"mean": named}, PLAN, roles=ROLES)["mean"].label == "mine"


class Hidden:
    """An object that nothing can look into."""

    def __init__(self, tree: Any):
        self.tree = tree


UNDECLARED = {
    "by name": (lambda tree: tree, r"has factors at \['w'\], whose role is not declared"),
    "field": (lambda tree: {"mu": tree}, r"has factors at \['mu'\]\['w'\], whose role is not declared"),
    "typo in roles": (lambda tree: {"maen": tree}, r"factors at \['maen'\]\['w'\]"),
    "beside others": (lambda tree: Record(tree, {"more": tree}), r"factors at \.other\['more'\]\['w'\]"),
    "list above": (lambda tree: {"mean": [tree]}, r"factors at \['mean'\]\[0\]\['w'\]"),
    "alone": (lambda tree: tree["w"], "has factors at its root"),
    "in a record": (lambda tree: Record(tree["w"]), r"has factors at \.velocity, in no dict by parameter name"),
    "matrix": (lambda tree: [tree["w"].b], r"has a tensor of shape \(5, 4\) at \[0\], whose role is not declared"),
    "tensors": (lambda tree: Record([*tree["w"]]), r"a tensor of shape \(5, 4\) at \.velocity\[0\], in no dict"),
    "object": (
        lambda tree: (Record(tree), Hidden(tree)),
        r"has a Hidden with tensors at \[1\], which cannot be searched",
    ),
    "deep object": (
        lambda tree: Record(tree, [Hidden({"a": (1, Hidden(tree))})]),
        r"a Hidden with tensors at \.other\[0\]",
    ),
    "module": (lambda tree: [Record(tree), torch.nn.Linear(2, 2)], r"has a Linear with tensors at \[1\]"),
    "proxy": (lambda tree: [Record(tree), MappingProxyType(tree)], r"a mappingproxy with tensors at \[1\]"),
    "set": (lambda tree: [Record(tree), {torch.ones(2)}], r"a set with tensors at \[1\]"),
    "mixed": (
        lambda tree: {"mean": {**tree, "mean": dict(tree)}},
        r"has factors and a dict side by side at \['mean'\], so that 'mean' may be a field or a parameter",
    ),
    "dense": (
        lambda tree: Record({**tree, "w": torch.ones(5, 6)}),
        r"must have factors of the planned parameter 'w' at \.velocity\['w'\] as 'first_moment', got a tensor",
    ),
    "by kind below the name": (
        lambda tree: Record({**tree, "w": {"slow": tree["w"], "fast": tree["w"]}}, {"mean": tree}),
        r"has a dict at \.velocity\['w'\] in place of the factors of 'w'",
    ),
    "by side below the name": (
        lambda tree: Record({"w": {"b": tree["w"].b, "a": tree["w"].a}}, {"mean": tree}),
        r"has a dict at \.velocity\['w'\] in place of the factors of 'w'",
    ),
    "a pair below the name": (
        lambda tree: Record({"w": (tree["w"].b, tree["w"].a)}, {"mean": tree}),
        r"has a tuple at \.velocity\['w'\] in place of the factors of 'w'",
    ),
    "flat": (
        lambda tree: Record(tree, {"mean": torch.ones(48)}),
        r"has a tensor of shape \(48,\) at \.other\['mean'\], in no dict by parameter name",
    ),
    "nothing": (lambda tree: Record({"bias": torch.ones(5)}), r"every planned parameter, got none for \['w'\]"),
    "unchanged": (lambda tree: {"shared": tree}, r"every planned parameter, got none for \['w'\]"),
}


@pytest.mark.parametrize(("make", "message"), UNDECLARED.values(), ids=UNDECLARED)
def test_what_nobody_declared_is_refused_by_its_path(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        project_optimizer_state(make(filled(TRAINABLE)), PLAN, roles=ROLES)


@pytest.mark.parametrize("name", ["w.b", ("w", "b"), "m"])
def test_tensors_under_other_names_than_those_of_the_parameters_are_refused(name: Any):
    state = Record({**filled(TRAINABLE), name: TRAINABLE["w"].b, "step": torch.tensor(3)})
    with pytest.raises(
        ValueError, match=r"at \.velocity\[.*\], but `trainable` has no parameter .*; store the state by"
    ):
        project_optimizer_state(state, PLAN, trainable=TRAINABLE)
    del state.velocity[name]
    project_optimizer_state(state, PLAN, trainable=TRAINABLE)


def test_roles_must_not_contradict_a_type():
    state = Record(filled(TRAINABLE))
    with pytest.raises(ValueError, match=r"`roles` has 'count' for 'velocity', but Record declares 'first_moment' for"):
        project_optimizer_state(state, PLAN, roles={"velocity": "count"})
    same = project_optimizer_state(state, PLAN, roles={"velocity": "first_moment"})
    assert_same(same, project_optimizer_state(state, PLAN))


def test_roles_may_add_a_field_to_a_type():
    new = project_optimizer_state(Record(filled(TRAINABLE), filled(TRAINABLE)), PLAN, roles={"other": "second_moment"})
    assert_same(new.other, new.velocity)


OF_OTHER_SHAPES = {
    "rank": ({"mean": {"w": Factors(torch.ones(5, 3), torch.ones(4, 6))}}, "equal stack axes and one rank"),
    "stack": ({"mean": {"w": Factors(torch.ones(2, 5, 4), torch.ones(4, 6))}}, "equal stack axes and one rank"),
    "another rank": (
        {
            "mean": {"w": Factors(torch.ones(5, 4), torch.ones(4, 6))},
            "square": {"w": Factors(torch.ones(5, 2), torch.ones(2, 6))},
        },
        "the rank 4 of the other fields of 'w'",
    ),
    "count": (
        {"seen": {"w": Factors(torch.ones(5, 4), torch.ones(4, 6))}},
        r"one entry for each vector as 'count', \(1, 4\)",
    ),
    "one axis": ({"mean": {"w": Factors(torch.ones(4), torch.ones(4))}}, "equal stack axes and one rank"),
}


@pytest.mark.parametrize(("state", "message"), OF_OTHER_SHAPES.values(), ids=OF_OTHER_SHAPES)
def test_factors_whose_shapes_do_not_fit_are_refused(state: Any, message: str):
    with pytest.raises(ValueError, match=rf"`opt_state` has factors of 'w' at .* must have .*{message}"):
        project_optimizer_state(state, PLAN, roles=ROLES)


@pytest.mark.parametrize(
    ("role", "b", "a"),
    [("mean", (4, 4), (4, 6)), ("mean", (1, 4), (4, 1)), ("square", (5, 4), (4, 1)), ("mean", (5, 2), (2, 6))],
)
def test_moments_must_have_the_shapes_of_trainable(role: str, b: tuple[int, int], a: tuple[int, int]):
    state = {role: {"w": Factors(torch.ones(b), torch.ones(a))}}
    with pytest.raises(ValueError, match=r"at \['\w+'\]\['w'\] of shapes .* for factors \(5, 4\) and \(4, 6\)"):
        project_optimizer_state(state, PLAN, roles=ROLES, trainable=TRAINABLE)


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
