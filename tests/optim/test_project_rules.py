"""Every rule for the counterparts' state is right for every optimizer."""

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map

from dynlora_fn import Factors, partition, project_optimizer_state, switch
from dynlora_fn.optim import Change, adamw
from dynlora_fn.optim._project_factors import Rule
from dynlora_fn.testing import assert_same, normal, untouched
from tests.support.foreign_states import torch_state, torchopt_state
from tests.support.optimizer_states import SWITCH, adamw_state, filled, updated_state, weights
from tests.support.optimizer_table import OPTIMIZERS as ENTRIES
from tests.support.optimizers import one_switch, some_trainable


class State(NamedTuple):
    """How a state is made from the trainable parameters, and which rules it does not have."""

    make: Callable[[Any], Any]
    first_moments: int = 1  # which "transport" needs
    has_moments: bool = True  # with an entry for each of the factors, which "prune" needs


def rules_of(state: State) -> list[str]:
    """Return the rules that a state supports."""
    refused = {"transport": not state.first_moments, "prune": not state.has_moments}
    return [rule for rule in get_args(Rule) if not refused.get(rule)]


# The table of optimizers and rules: how each changes the state, and that only the counterparts' entries change.
STATES = {
    **{name: State(updated_state(entry.transform), int(entry.has_first_moment)) for name, entry in ENTRIES.items()},
    "torch.optim.Adam": State(torch_state(torch.optim.Adam, amsgrad=True)),
    "torch.optim.AdamW": State(torch_state(torch.optim.AdamW)),
    "torch.optim.NAdam": State(torch_state(torch.optim.NAdam)),
    "torch.optim.RAdam": State(torch_state(torch.optim.RAdam)),
    "torch.optim.Adamax": State(torch_state(torch.optim.Adamax)),
    "torch.optim.SGD": State(torch_state(torch.optim.SGD, momentum=0.9)),
    "torch.optim.RMSprop": State(torch_state(torch.optim.RMSprop, momentum=0.9), 0),  # a buffer of steps, not linear
    "torch.optim.RMSprop, centered": State(torch_state(torch.optim.RMSprop, momentum=0.9, centered=True)),
    "torch.optim.Adagrad": State(torch_state(torch.optim.Adagrad), 0),
    "torch.optim.Adadelta": State(torch_state(torch.optim.Adadelta), 0),
    "torch.optim.Adafactor": State(torch_state(torch.optim.Adafactor), 0, has_moments=False),
    "torchopt.adamw": State(torchopt_state("adamw")),
    "torchopt.adamax": State(torchopt_state("adamax")),
    "torchopt.radam": State(torchopt_state("radam")),
    "torchopt.adadelta": State(torchopt_state("adadelta"), 0),
    "torchopt.adagrad": State(torchopt_state("adagrad"), 0),
    "torchopt.rmsprop": State(torchopt_state("rmsprop", momentum=0.9)),
    "torchopt.rmsprop, centered": State(torchopt_state("rmsprop", momentum=0.9, centered=True), 2),
    "torchopt.sgd": State(torchopt_state("sgd", momentum=0.9)),
}
TRANSPORTED = {name: state for name, state in STATES.items() if state.first_moments}
CASES = [(name, rule) for name, state in STATES.items() for rule in rules_of(state)]


def projected(state: State, rule: str, **settings: Any) -> tuple[Any, Any]:
    """Return a state before and after a switch."""
    params, plan = weights(), one_switch(**SWITCH)
    trainable = partition(params).trainable
    settings |= {"change": Change(params, switch(params, plan).params)} if rule == "transport" else {}
    before = state.make(trainable)
    with untouched(before):
        return before, project_optimizer_state(before, plan, rule=rule, trainable=trainable, **settings)


def sides(before: Any, after: Any) -> list[tuple[str, Tensor, Tensor]]:
    """Return every tensor of the state before and after, with its path."""
    left, structure = tree_flatten_with_path(before)
    right, same = tree_flatten_with_path(after)
    assert structure == same
    pairs = zip(left, right, strict=True)
    return [(keystr(path), old, new) for (path, old), (_, new) in pairs if isinstance(old, Tensor)]


@pytest.mark.parametrize(("name", "rule"), CASES)
def test_every_optimizer_follows_every_rule_for_the_counterparts_alone(name, rule):
    before, after = projected(STATES[name], rule, **({"prune": 0.5} if rule == "prune" else {}))
    changed = 0
    for path, old, new in sides(before, after):
        assert (old.shape, old.dtype) == (new.shape, new.dtype), path
        is_other = old != new
        if old.shape in [(5, 4), (1, 4)]:  # side b of the weight: switching a[2] concerns b[:, 2]
            assert not is_other[:, [0, 1, 3]].any(), path
        elif old.shape in [(4, 6), (4, 1)]:
            assert not is_other[[1, 2]].any(), path
        else:
            assert not is_other.any(), path
        changed += bool(is_other.any())
    assert bool(changed) == (rule != "keep")


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_reset_leaves_no_moment(state):
    for path, old, new in sides(*projected(state, "reset")):
        if old.shape == (5, 4):
            assert not new[:, 2].any(), path
        if old.shape == (4, 6):
            assert not new[[0, 3]].any(), path


def test_a_count_that_restarts_at_the_thaw():
    trainable = partition(weights()).trainable
    optimizer, plan = adamw(), one_switch(**SWITCH)
    state = updated_state(optimizer)(trainable)
    gentle = 0.1 / (1 - 0.9**6) / (0.001 / (1 - 0.999**6)) ** 0.5
    for rule, counts, first in (("reset", [1, 2, 3, 4, 5, 6], gentle), ("reset_thawed", [-4, -3, -2, -1, 0, 1], 1.0)):
        opt_state = project_optimizer_state(state, plan, rule=rule)
        moved, counted = [], []
        for _ in range(6):
            grads = tree_map(torch.ones_like, dict(trainable))
            updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=1.0)
            moved.append(-updates["w"].b[0, 2].item())
            counted.append(opt_state.inner.count["w"].b[0, 2].item())
        assert counted == counts
        assert moved[:5] == [0] * 5
        assert moved[5] == pytest.approx(first, abs=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99, 1.0])
def test_pruning_is_relora_s(share):
    """ReLoRA keeps ``|x| > quantile(|x|, share)`` of a matrix that is fully switched (arXiv:2307.05695's code).

    Here an entry is kept only with its second moment. The share 1 leaves nothing, and 0 drops the smallest.
    """
    trainable = partition(weights()).trainable
    state = updated_state(adamw())(trainable)
    plan = one_switch(b=[0, 1, 2, 3], a=[0, 1, 2, 3], frozen_for=0)
    new = project_optimizer_state(state, plan, rule="prune", prune=share)
    for side in range(2):
        mu, nu = state.inner.mu["w"][side], state.inner.nu["w"][side]
        is_kept = mu.abs() > torch.quantile(mu.abs().flatten(), share)
        assert_same(new.inner.mu["w"][side], torch.where(is_kept, mu, 0.0))
        assert_same(new.inner.nu["w"][side], torch.where(is_kept | (nu > torch.quantile(nu.flatten(), share)), nu, 0.0))
    assert_same(new.inner.count, state.inner.count)


@pytest.mark.parametrize("state", TRANSPORTED.values(), ids=TRANSPORTED)
def test_transport_is_exact_where_the_old_vectors_tell_all(state):
    """For a G within the span of the old vectors, ``G a.T / rank`` becomes its value with the new vectors."""
    params, plan = weights(), one_switch(**SWITCH)
    after, _ = switch(params, plan)
    (b, a), (new_b, new_a) = params["w"].factors, after["w"].factors
    inner = normal(3, 4, 4)
    trainable = partition(params).trainable
    gradient = b @ inner @ a  # both sides' spans
    moment = Factors(gradient @ a.mT / 4, b.mT @ gradient / 4)
    wanted = Factors(gradient @ new_a.mT / 4, new_b.mT @ gradient / 4)

    def replaced(leaf):
        return moment.b if leaf.shape == (5, 4) else moment.a if leaf.shape == (4, 6) else leaf

    before = tree_map(lambda leaf: replaced(leaf) if isinstance(leaf, Tensor) else leaf, state.make(trainable))
    got = project_optimizer_state(before, plan, rule="transport", change=Change(params, after), trainable=trainable)
    found = [
        (old, new) for path, old, new in sides(before, got) if old.shape in [(5, 4), (4, 6)] and (old != new).any()
    ]
    assert len(found) == 2 * state.first_moments
    for old, new in found:
        goal = wanted.b if old.shape == (5, 4) else wanted.a
        torch.testing.assert_close(new, goal, rtol=1e-9, atol=1e-9)


def test_torch_optim_takes_its_state_back():
    _, after = projected(STATES["torch.optim.AdamW"], "reset")
    leaves = [leaf.clone().requires_grad_() for leaf in tree_leaves(partition(weights()).trainable)]
    optimizer = torch.optim.AdamW(leaves, lr=0.1)
    optimizer.load_state_dict(after)
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)
    before = leaves[0].detach().clone()
    optimizer.step()
    assert_same(before[:, 2] * (1 - 0.1 * 0.01), leaves[0].detach()[:, 2])  # only weight decay: no moment is left
    assert (before[:, 1] * (1 - 0.1 * 0.01) != leaves[0].detach()[:, 1]).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "rest"}, "`rule` must be 'reset', 'reset_thawed', 'keep', 'prune' or 'transport', got 'rest'"),
        ({"rule": "prune", "prune": 1.5}, "`prune` is 1.5; use a number from 0 to 1"),
        (
            {"rule": "transport"},
            "`change` is missing for rule 'transport'; pass it for rule 'transport'",
        ),
        ({"change": Change({}, {})}, "`change` is passed for rule 'reset'; pass it for rule 'transport'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        project_optimizer_state(adamw_state(some_trainable()), one_switch(**SWITCH), **settings)


@pytest.mark.parametrize("change", [weights(), (weights(),), 3])
def test_what_is_no_change_is_refused(change):
    with pytest.raises(TypeError, match=r"`change` is .*; pass a Change"):
        project_optimizer_state(adamw_state(some_trainable()), one_switch(**SWITCH), rule="transport", change=change)


def test_a_state_without_a_first_moment_is_not_transported():
    params = weights()
    state, change = {"square_avg": filled(partition(params).trainable)}, Change(params, params)
    with pytest.raises(ValueError, match=r"`opt_state` must have a first moment .* \['w'\]"):
        project_optimizer_state(
            state, one_switch(**SWITCH), rule="transport", change=change, roles={"square_avg": "second_moment"}
        )


def test_autocast_does_not_round_what_is_transported():
    params = tree_map(lambda leaf: leaf.float() if leaf.is_floating_point() else leaf, weights())
    trainable, plan, optimizer = partition(params).trainable, one_switch(**SWITCH), adamw()
    state = optimizer.update(trainable, optimizer.init(trainable), trainable, lr=0.1).opt_state
    change = Change(params, switch(params, plan).params)
    wanted = project_optimizer_state(state, plan, rule="transport", change=change)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(project_optimizer_state(state, plan, rule="transport", change=change), wanted)
