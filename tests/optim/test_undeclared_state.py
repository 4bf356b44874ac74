"""State whose roles nobody declared, or whose shapes do not fit, is refused by its path."""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pytest
import torch

from dynlora_fn import Factors, project_optimizer_state
from dynlora_fn.testing import Shape, assert_same, low_rank, normal, plan_of
from tests.support.optimizer_states import SWITCH, Record, filled
from tests.support.optimizers import one_switch

PARAM = low_rank(Shape(5, 6, 4))
TRAINABLE = {"w": PARAM.factors, "bias": normal(1, 5)}
PLAN = one_switch(**SWITCH)
ROLES = {"mean": "first_moment", "square": "second_moment", "seen": "count", "shared": "unchanged"}


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
    "in a record": (lambda tree: Record(tree["w"]), r"has factors at \.velocity outside a dict by parameter name"),
    "matrix": (lambda tree: [tree["w"].b], r"has a tensor of shape \(5, 4\) at \[0\], whose role is not declared"),
    "tensors": (lambda tree: Record([*tree["w"]]), r"a tensor of shape \(5, 4\) at \.velocity\[0\] outside a dict"),
    "object": (
        lambda tree: (Record(tree), Hidden(tree)),
        r"has a Hidden with tensors at \[1\], which cannot be searched",
    ),
    "deep object": (
        lambda tree: Record(tree, [Hidden({"a": (1, Hidden(tree))})]),
        r"a Hidden with tensors at \.other\[0\]",
    ),
    "object by name": (
        lambda tree: Record({**tree, "bias": Hidden(tree["bias"])}),
        r"a Hidden with tensors at \.velocity\['bias'\], which cannot be searched",
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
        r"has a tensor of shape \(48,\) at \.other\['mean'\] outside a dict by parameter name",
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


class Named(dict):
    """A dict with attributes."""


@dataclass
class Cached:
    mu: dict
    roles = {"mu": "first_moment"}  # noqa: RUF012

    def __post_init__(self) -> None:
        self.cache = self.mu


def test_tensors_that_no_field_has_are_refused():
    factors = {"w": Factors(torch.ones(3, 2), torch.ones(2, 3))}
    named = Named(mu=factors)
    named.cache = factors
    for state in (named, Cached(factors), {"inner": Cached(factors)}):
        with pytest.raises(ValueError, match="with tensors in its attribute 'cache', which is no field"):
            project_optimizer_state(state, {"w": plan_of(2, b=1, a=1)}, roles={"mu": "first_moment"})
