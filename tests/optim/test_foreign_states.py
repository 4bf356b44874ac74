"""States of torch.optim and torchopt: the right tensors are found, and everything that is not known is refused."""

from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dynlora_fn import Factors, partition, project_optimizer_state
from dynlora_fn.testing import Shape, assert_same, low_rank, normal
from tests.support.foreign_states import leaves_of, named_leaves, stepped, torch_state, torchopt_state
from tests.support.optimizer_states import SWITCH, weights
from tests.support.optimizers import one_switch

PLAN = one_switch(**SWITCH)
TRAINABLE = partition(weights()).trainable


def tensors_of(state: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map(lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) else None, state)
    return found


def changed(before: dict, after: dict, field: str) -> set[int]:
    """Return the numbers of the tensors whose field has changed."""
    states = before["state"], after["state"]
    return {index for index, entry in states[0].items() if not torch.equal(entry[field], states[1][index][field])}


def test_named_tensors_are_found_in_any_groups_and_order():
    named = named_leaves(TRAINABLE)
    groups = [["other.a", "w.a"], ["bias", "other.b", "w.b"]]
    state = stepped(torch.optim.AdamW([{"params": [(name, named[name]) for name in names]} for names in groups]))
    new = project_optimizer_state(state, PLAN, trainable=TRAINABLE)
    assert changed(state, new, "exp_avg") == changed(state, new, "exp_avg_sq") == {1, 4}
    assert not new["state"][4]["exp_avg"][:, 2].any()
    assert not new["state"][1]["exp_avg"][[0, 3]].any()
    assert new["param_groups"] == state["param_groups"]


def test_names_need_not_be_those_of_one_group():
    named = named_leaves(TRAINABLE)
    state = stepped(torch.optim.SGD(reversed(named.items()), lr=0.1, momentum=0.9))
    new = project_optimizer_state(state, PLAN, trainable=TRAINABLE)
    assert changed(state, new, "momentum_buffer") == {3, 4}


def test_a_state_by_name_is_found():
    """`torch.distributed.checkpoint.state_dict` has names in place of numbers."""
    by_number = torch_state(torch.optim.AdamW)(TRAINABLE)
    names = list(named_leaves(TRAINABLE))
    state = {
        "state": {names[index]: entry for index, entry in by_number["state"].items()},
        "param_groups": [{**by_number["param_groups"][0], "params": names}],
    }
    new = project_optimizer_state(state, PLAN, trainable=TRAINABLE)
    wanted = project_optimizer_state(by_number, PLAN, trainable=TRAINABLE)
    assert_same([*new["state"].values()], [*wanted["state"].values()])


def without(name: str) -> dict[str, Tensor]:
    return {key: leaf for key, leaf in named_leaves(TRAINABLE).items() if key != name}


def groups_of(named: dict[str, Tensor]) -> list[dict[str, Any]]:
    return [{"params": [leaf]} for leaf in named.values()]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            lambda: stepped(torch.optim.AdamW(groups_of(named_leaves(TRAINABLE)))),
            "has 5 parameter groups without names",
        ),
        (lambda: stepped(torch.optim.AdamW([*without("w.a").items()])), "must name the factors .* got no w.a"),
        (lambda: stepped(torch.optim.AdamW([*without("w.a").values()])), "has 4 tensors and `trainable` has 5; pass"),
        (
            lambda: stepped(torch.optim.AdamW(leaves_of(TRAINABLE)[::-1])),
            r"factors of 'w' at \['state'\]\[0\]\['exp_avg'\] of shapes \(2, 4\) and \(3, 2\); they must have",
        ),
        (
            lambda: stepped(torch.optim.Adafactor([*reversed(leaves_of(TRAINABLE))])),
            r"at \['state'\]\[0\]\['(col|row)_var'\]",
        ),
        (torch_state(torch.optim.Rprop), r"for 'w' the fields \['prev', 'step_size'\]"),
        (torch_state(torch.optim.ASGD), r"for 'w' the fields \['ax', 'eta', 'mu'\]"),
        (torch_state(torch.optim.LBFGS), r"for 'w' the fields \['H_diag', 'al', .*'old_dirs'"),
    ],
    ids=["groups", "unnamed", "fewer", "another order", "Adafactor in another order", "Rprop", "ASGD", "LBFGS"],
)
def test_a_state_of_torch_that_is_not_understood_is_refused(state, message):
    state = state(TRAINABLE) if state.__code__.co_argcount else state()
    with pytest.raises(ValueError, match=message):
        project_optimizer_state(state, PLAN, trainable=TRAINABLE)


def test_a_state_with_one_side_of_a_weight_is_refused():
    state = torch_state(torch.optim.AdamW)(TRAINABLE)
    del state["state"][1]
    with pytest.raises(
        ValueError, match=r"for 'w' the fields \['exp_avg', 'exp_avg_sq', 'step'\] of `b` and \[\] of `a`"
    ):
        project_optimizer_state(state, PLAN, trainable=TRAINABLE)


def test_moments_in_a_subclass_of_tensor_are_refused():
    """As torchao's optimizers in 8 bit have them."""
    torchao = pytest.importorskip("torchao.optim.subclass_8bit")
    state = torch_state(torch.optim.AdamW)(TRAINABLE)
    for index in range(2):
        state["state"][index]["exp_avg"] = torchao.OptimState8bit.zeros((16, 256), signed=True)
    with pytest.raises(ValueError, match="for 'w' 'exp_avg' as OptimState8bit; only plain tensors can be projected"):
        project_optimizer_state(state, PLAN, trainable=TRAINABLE)


def test_a_state_before_the_first_step_is_refused():
    state = torch.optim.AdamW(leaves_of(TRAINABLE)).state_dict()
    with pytest.raises(ValueError, match=r"must have the factors of every planned parameter, got none for \['w'\]"):
        project_optimizer_state(state, PLAN, trainable=TRAINABLE)


def test_trainable_is_required_for_numbered_tensors():
    with pytest.raises(ValueError, match=r"numbers its tensors at \['state'\]; pass `trainable`"):
        project_optimizer_state(torch_state(torch.optim.AdamW)(TRAINABLE), PLAN)
    with pytest.raises(ValueError, match=r"has a list of tensors at \[0\]\.mu; pass `trainable`"):
        project_optimizer_state(torchopt_state("adam")(TRAINABLE), PLAN)


def test_muon_of_torch_is_projected():
    trainable = {"w": TRAINABLE["w"]}
    state = torch_state(torch.optim.Muon)(trainable)
    new = project_optimizer_state(state, PLAN, trainable=trainable)
    assert changed(state, new, "momentum_buffer") == {0, 1}


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("stack", [(), (3,)])
def test_adafactor_keeps_what_all_vectors_share(rank, stack):
    trainable = partition({"w": low_rank(Shape(5, 6, rank), stack)}).trainable
    plan = one_switch(b=[0], a=[rank - 1], frozen_for=2, rank=rank)
    state = torch_state(torch.optim.Adafactor)(trainable)
    new = project_optimizer_state(state, plan, trainable=trainable)
    (b, a), (new_b, new_a) = ([tree["state"][index] for index in range(2)] for tree in (state, new))
    assert_same((new_b["row_var"], new_a["col_var"]), (b["row_var"], a["col_var"]))
    assert_same((new_b["step"], new_a["step"]), (b["step"], a["step"]))
    of_b, of_a = b["col_var"].clone(), a["row_var"].clone()
    of_b[..., rank - 1], of_a[..., 0, :] = 0, 0
    assert_same((new_b["col_var"], new_a["row_var"]), (of_b, of_a))


def test_statistics_of_vectors_cannot_be_pruned():
    state = torch_state(torch.optim.Adafactor)(TRAINABLE)
    with pytest.raises(ValueError, match=r"must have a moment of every planned parameter, got none for \['w'\]"):
        project_optimizer_state(state, PLAN, rule="prune", trainable=TRAINABLE)


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_torchopt_s_lists_have_optree_s_order(kind):
    """It sorts the keys of a dict, and not those of an OrderedDict."""
    trainable = kind((name, TRAINABLE[name]) for name in ("w", "other", "bias"))
    new = project_optimizer_state(torchopt_state("adam")(trainable), PLAN, trainable=trainable)
    zeros = {tuple(leaf.shape) for leaf in tensors_of(new) if leaf.ndim == 2 and (leaf == 0).any()}
    assert zeros == {(5, 4), (4, 6)}


def test_torchopt_s_trees_are_projected_by_name():
    torchopt = pytest.importorskip("torchopt", reason="has no wheel for every version of Python")
    state = torchopt.transform.scale_by_adam().init(TRAINABLE)
    state = tree_map(lambda leaf: torch.ones_like(leaf) if isinstance(leaf, Tensor) else leaf, state)
    new = project_optimizer_state(state, PLAN)
    assert isinstance(new.mu["w"], Factors)
    assert not new.mu["w"].b[:, 2].any()
    assert_same(new.count, state.count)


def test_a_type_of_torchopt_that_is_not_in_the_table_is_refused():
    class ScaleByNothingState(NamedTuple):
        mu: Any

    ScaleByNothingState.__module__ = "torchopt.transform.scale_by_nothing"
    with pytest.raises(ValueError, match=r"has a ScaleByNothingState of torchopt at \[0\], which is not supported"):
        project_optimizer_state((ScaleByNothingState({"w": normal(0, 2)}),), PLAN)


def test_a_list_of_torchopt_that_does_not_fit_is_refused():
    state = torchopt_state("adam")(TRAINABLE)
    with pytest.raises(ValueError, match=r"has 5 tensors at \[0\]\.mu and `trainable` has 2"):
        project_optimizer_state(state, PLAN, trainable={"w": TRAINABLE["w"]})
    with pytest.raises(ValueError, match=r"factors of 'w' at \[0\]\.mu\[3\] of shapes"):
        project_optimizer_state(state, PLAN, trainable={**TRAINABLE, "w": low_rank(Shape(6, 5, 4)).factors})


@pytest.mark.parametrize("side", [1, 2])
def test_a_list_without_one_side_of_a_weight_is_refused(side):
    state = torchopt_state("adam")(TRAINABLE)
    state[0].mu[side] = None
    with pytest.raises(ValueError, match=r"has no tensors of 'other' at \[0\]\.mu\[1\] and \[2\]"):
        project_optimizer_state(state, PLAN, trainable=TRAINABLE)


@pytest.mark.parametrize("make", [torch_state(torch.optim.AdamW), torchopt_state("adam")])
def test_a_state_of_weights_that_train_one_side_is_refused(make):
    params = {"w": low_rank(Shape(5, 6, 4), trained="b")}
    trainable = partition(params).trainable
    with pytest.raises(ValueError, match=r"`trainable` has only `b` of 'w'"):
        project_optimizer_state(make(TRAINABLE), PLAN, trainable=trainable)
