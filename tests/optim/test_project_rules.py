"""Every rule for the counterparts' state holds for every optimizer."""

from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map

from dynlora_fn import Factors, partition, project_optimizer_state, switch
from dynlora_fn.optim import Change, adamw
from dynlora_fn.optim._project_state import Rule
from dynlora_fn.testing import assert_same, normal, untouched
from tests.support.optimizer_states import SWITCH, adamw_state, filled, updated_state, weights
from tests.support.optimizer_table import OPTIMIZERS as ENTRIES
from tests.support.optimizers import one_switch, some_trainable


# The table of optimizers and rules: how each changes the state, and that only the counterparts' entries change.
def torch_state(kind: Any, **settings: Any) -> Any:
    """Return a function that makes the state dict of one of torch's optimizers after two steps."""

    def make(trainable: Any) -> Any:
        leaves = [leaf.clone().requires_grad_() for leaf in tree_leaves(trainable)]
        optimizer = kind(leaves, lr=0.1, **settings)
        for seed in range(2):
            for index, leaf in enumerate(leaves):
                leaf.grad = normal(seed + index, *leaf.shape)
            optimizer.step()
        return optimizer.state_dict()

    return make


def torchopt_state(name: str, **settings: Any) -> Any:
    """Return a function that makes torchopt's state: lists of all leaves, in the order of sorted names."""

    def make(trainable: Any) -> Any:
        torchopt = pytest.importorskip("torchopt", reason="has no wheel for every version of Python")
        optimizer = getattr(torchopt, name)(0.1, **settings)
        state = optimizer.init(trainable)
        for seed in range(2):
            grads = tree_map(lambda leaf: normal(seed, *leaf.shape), trainable)  # noqa: B023, called at once
            _, state = optimizer.update(grads, state, params=trainable, inplace=False)
        return state

    return make


# By optimizer: how its state is made.
OPTIMIZERS = {
    **{name: updated_state(entry.transform) for name, entry in ENTRIES.items()},
    "torch.optim.AdamW": torch_state(torch.optim.AdamW),
    "torch.optim.SGD": torch_state(torch.optim.SGD, momentum=0.9),
    "torch.optim.RMSprop": torch_state(torch.optim.RMSprop, momentum=0.9),
    "torchopt.adamw": torchopt_state("adamw"),
    "torchopt.sgd": torchopt_state("sgd", momentum=0.9),
}
TRANSPORTED = {name: make for name, make in OPTIMIZERS.items() if name not in ENTRIES or ENTRIES[name].has_first_moment}
CASES = [(name, rule) for name in OPTIMIZERS for rule in get_args(Rule) if rule != "transport" or name in TRANSPORTED]


def projected(make: Any, rule: str, **settings: Any) -> tuple[Any, Any, Change]:
    params = weights()
    plan = one_switch(**SWITCH)
    after, _ = switch(params, plan)
    trainable = partition(params).trainable
    ordered = {name: trainable[name] for name in sorted(trainable)}
    state = make(ordered)
    change = Change(params, after)
    with untouched(state):
        settings |= {"change": change} if rule == "transport" else {}
        new = project_optimizer_state(state, plan, rule=rule, trainable=ordered, **settings)
    return state, new, change


def sides(before: Any, after: Any) -> list[tuple[str, Tensor, Tensor]]:
    """Return every tensor of the state before and after, with its path."""
    left, structure = tree_flatten_with_path(before)
    right, same = tree_flatten_with_path(after)
    assert structure == same
    pairs = zip(left, right, strict=True)
    return [(keystr(path), old, new) for (path, old), (_, new) in pairs if isinstance(old, Tensor)]


@pytest.mark.parametrize(("name", "rule"), CASES)
def test_every_optimizer_follows_every_rule_for_the_counterparts_alone(name, rule):
    make = OPTIMIZERS[name]
    before, after, _ = projected(make, rule, prune=0.5) if rule == "prune" else projected(make, rule)
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


@pytest.mark.parametrize("make", TRANSPORTED.values(), ids=TRANSPORTED)
def test_reset_leaves_no_moment(make):
    for path, old, new in sides(*projected(make, "reset")[:2]):
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
            counted.append(opt_state.count["w"].b[0, 2].item())
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
        mu, nu = state.mu["w"][side], state.nu["w"][side]
        is_kept = mu.abs() > torch.quantile(mu.abs().flatten(), share)
        assert_same(new.mu["w"][side], torch.where(is_kept, mu, 0.0))
        assert_same(new.nu["w"][side], torch.where(is_kept | (nu > torch.quantile(nu.flatten(), share)), nu, 0.0))
    assert_same(new.count, state.count)


@pytest.mark.parametrize("make", TRANSPORTED.values(), ids=TRANSPORTED)
def test_transport_is_exact_where_the_old_vectors_tell_all(make):
    """For a G within the span of the old vectors, ``G a.T / rank`` becomes its value with the new vectors."""
    params, plan = weights(), one_switch(**SWITCH)
    after, _ = switch(params, plan)
    (b, a), (new_b, new_a) = params["w"].factors, after["w"].factors
    inner = normal(3, 4, 4)
    trainable = partition(params).trainable
    ordered = {name: trainable[name] for name in sorted(trainable)}
    gradient = b @ inner @ a  # both sides' spans
    moment = Factors(gradient @ a.mT / 4, b.mT @ gradient / 4)
    wanted = Factors(gradient @ new_a.mT / 4, new_b.mT @ gradient / 4)

    def replaced(leaf):
        return moment.b if leaf.shape == (5, 4) else moment.a if leaf.shape == (4, 6) else leaf

    state = tree_map(lambda leaf: replaced(leaf) if isinstance(leaf, Tensor) else leaf, make(ordered))
    got = project_optimizer_state(state, plan, rule="transport", change=Change(params, after), trainable=ordered)
    found = [(old, new) for path, old, new in sides(state, got) if old.shape in [(5, 4), (4, 6)] and (old != new).any()]
    assert len(found) == 2
    for old, new in found:
        goal = wanted.b if old.shape == (5, 4) else wanted.a
        torch.testing.assert_close(new, goal, rtol=1e-9, atol=1e-9)


def test_torch_optim_takes_its_state_back():
    _, after, _ = projected(OPTIMIZERS["torch.optim.AdamW"], "reset")
    trainable = partition(weights()).trainable
    leaves = [
        leaf.clone().requires_grad_() for leaf in tree_leaves({name: trainable[name] for name in sorted(trainable)})
    ]
    optimizer = torch.optim.AdamW(leaves, lr=0.1)
    optimizer.load_state_dict(after)
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)
    before = leaves[3].detach().clone()
    optimizer.step()
    assert_same(before[:, 2] * (1 - 0.1 * 0.01), leaves[3].detach()[:, 2])  # only weight decay: no moment is left
    assert (before[:, 1] * (1 - 0.1 * 0.01) != leaves[3].detach()[:, 1]).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "rest"}, "`rule` must be one of reset, reset_thawed, keep, prune, transport, got 'rest'"),
        ({"rule": "prune", "prune": 1.5}, r"`prune` must be in \[0, 1\], got 1.5"),
        (
            {"rule": "transport"},
            "`change` must be passed with rule 'transport' and with no other, got rule 'transport'",
        ),
        ({"change": Change({}, {})}, "`change` must be passed .* got rule 'reset'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        project_optimizer_state(adamw_state(some_trainable()), one_switch(**SWITCH), **settings)


def test_a_state_without_a_first_moment_is_not_transported():
    params = weights()
    state, change = {"other": filled(partition(params).trainable)}, Change(params, params)
    with pytest.raises(ValueError, match=r"`opt_state` must have a first moment .* \['w'\]"):
        project_optimizer_state(state, one_switch(**SWITCH), rule="transport", change=change)
