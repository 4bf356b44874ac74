"""What a switch does to the state of an optimizer: the counterparts start afresh, and nothing else changes."""

from typing import Any, NamedTuple, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optimizer_table import OPTIMIZERS as ENTRIES
from test_optim import one_switch, some_trainable
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map

from dynlora_fn import Factors, Plan, apply_updates, partition, project_optimizer_state, switch
from dynlora_fn.optim import AdamWState, Change, adamw, lion, sgd
from dynlora_fn.optim._project_state import Rule
from dynlora_fn.testing import Shape, assert_same, low_rank, low_rank_params, normal, plans, untouched


class Momentum(NamedTuple):
    """Of stochastic gradient descent."""

    velocity: dict[str, Any]
    decay: float
    step: Tensor


def filled(trainable: Any, seed: int = 0) -> Any:
    """A tree like the parameters that is zero nowhere."""
    return tree_map(lambda leaf: normal(seed, *leaf.shape).abs() + 1, dict(trainable))


def per_vector(trainable: Any) -> Any:
    """Whole numbers from 1 on, in the shapes of step counts."""
    counts = tree_map(lambda leaf: leaf + 7, adamw().init(trainable).count)
    return {name: count for name, count in counts.items() if isinstance(count, Factors)}


def adamw_state(trainable: Any) -> AdamWState:
    counts = {**per_vector(trainable), "bias": torch.tensor(3)}
    return AdamWState(filled(trainable), filled(trainable, 1), counts, per_vector(trainable))


# By name: a state, as a function of the trainable parameters.
STATES = {
    "adamw": adamw_state,
    "momentum": lambda trainable: Momentum(filled(trainable), 0.9, torch.tensor(3)),
    "plain dict": filled,
    "nested": lambda trainable: [
        {"inner": (filled(trainable), [per_vector(trainable)], None)},
        (1, "name", Momentum(filled(trainable), 0.9, torch.tensor(1))),
    ],
    "frozen_for in a dict": lambda trainable: {"frozen_for": {"deep": per_vector(trainable)}, "mu": filled(trainable)},
}


def reset_slowly(leaf: Factors, plan: Plan, value: int) -> Factors:
    """The counterparts of the switched slots, one by one."""
    b, a = (factor.clone() for factor in leaf)
    for at in np.ndindex(*b.shape[:-2]):
        for side, vectors in ((plan.a, b[at].mT), (plan.b, a[at])):
            slots, active = (index.broadcast_to(*b.shape[:-2], -1)[at].tolist() for index in (side.slots, side.active))
            for slot, is_active in zip(slots, active, strict=True):
                if is_active:
                    vectors[slot] = value
    return Factors(b, a)


def projected_slowly(state: Any, plan: dict[str, Plan], *, in_frozen_for: bool = False) -> Any:
    if isinstance(state, dict):
        return {
            key: reset_slowly(leaf, plan[key], int(plan[key].frozen_for) if in_frozen_for else 0)
            if isinstance(leaf, Factors) and key in plan
            else projected_slowly(leaf, plan, in_frozen_for=in_frozen_for or key == "frozen_for")
            for key, leaf in state.items()
        }
    if isinstance(state, AdamWState):
        fields = projected_slowly(state._asdict(), plan)
        return AdamWState(**fields)
    if isinstance(state, Momentum):
        return state._replace(velocity=projected_slowly(state.velocity, plan))
    if type(state) in (tuple, list):
        return type(state)(projected_slowly(leaf, plan, in_frozen_for=in_frozen_for) for leaf in state)
    return state


@pytest.mark.parametrize("make", STATES.values(), ids=STATES)
@given(data=st.data())
def test_only_the_counterparts_start_afresh(make, data):
    weights = {name: data.draw(low_rank_params(), name) for name in ("w", "other", "third")}
    plan = {name: data.draw(plans(weights[name]), f"plan of {name}") for name in ("w", "third")}
    trainable = partition({**weights, "bias": normal(0, 3)}).trainable
    state = make(trainable)
    with untouched(state, plan):
        got = project_optimizer_state(state, plan)
    assert_same(got, projected_slowly(state, plan))
    assert_same(project_optimizer_state(state, {}), state)


def test_the_switched_vector_keeps_its_state():
    """Side a switched: b is reset; it is not the other way about."""
    trainable = some_trainable()
    state = project_optimizer_state(adamw_state(trainable), one_switch(b=[], a=[2], frozen_for=5))
    assert not state.mu["w"].b[:, 2].any()
    assert state.mu["w"].b[:, [0, 1, 3]].all()
    assert state.mu["w"].a.all()
    assert state.count["w"].b.flatten().tolist() == [7, 7, 0, 7]
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


# The table of optimizers and rules: what each makes of its state, and that nothing but the counterparts' changes.


def torch_state(kind: Any, **settings: Any) -> Any:
    """The state dict of one of torch's optimizers after two steps over the leaves of the parameters."""

    def make(trainable: Any) -> Any:
        leaves = [leaf.clone().requires_grad_() for leaf in tree_leaves(trainable)]
        optimizer = kind(leaves, lr=0.1, **settings)
        for seed in range(2):
            for number, leaf in enumerate(leaves):
                leaf.grad = normal(seed + number, *leaf.shape)
            optimizer.step()
        return optimizer.state_dict()

    return make


def torchopt_state(name: str, **settings: Any) -> Any:
    """In lists of all leaves, in the order of sorted names."""

    def make(trainable: Any) -> Any:
        torchopt = pytest.importorskip("torchopt", reason="has no wheel for every version of Python")
        optimizer = getattr(torchopt, name)(0.1, **settings)
        state = optimizer.init(trainable)
        for seed in range(2):
            grads = tree_map(lambda leaf: normal(seed, *leaf.shape), trainable)  # noqa: B023, called at once
            _, state = optimizer.update(grads, state, params=trainable, inplace=False)
        return state

    return make


def own_state(transform: Any) -> Any:
    def make(trainable: Any) -> Any:
        state = transform.init(trainable)
        for seed in range(2):
            grads = tree_map(lambda leaf: normal(seed, *leaf.shape), dict(trainable))  # noqa: B023, called at once
            _, state = transform.update(grads, state, trainable, lr=0.1)
        return state

    return make


# By optimizer: how its state is made.
OPTIMIZERS = {
    **{name: own_state(entry.transform) for name, entry in ENTRIES.items()},
    "torch.optim.AdamW": torch_state(torch.optim.AdamW),
    "torch.optim.SGD": torch_state(torch.optim.SGD, momentum=0.9),
    "torch.optim.RMSprop": torch_state(torch.optim.RMSprop, momentum=0.9),
    "torchopt.adamw": torchopt_state("adamw"),
    "torchopt.sgd": torchopt_state("sgd", momentum=0.9),
}
TRANSPORTED = {name: make for name, make in OPTIMIZERS.items() if name not in ENTRIES or ENTRIES[name].has_first_moment}
CASES = [(name, rule) for name in OPTIMIZERS for rule in get_args(Rule) if rule != "transport" or name in TRANSPORTED]
SWITCH = {"b": [0, 3], "a": [2], "frozen_for": 5}


def weights() -> dict[str, Any]:
    return {"w": low_rank(Shape(5, 6, 4), seed=0), "bias": normal(1, 5), "other": low_rank(Shape(3, 4, 2), seed=1)}


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
    """Every tensor of the state before and after, with its path."""
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


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_reset_leaves_no_moment(make):
    for path, old, new in sides(*projected(make, "reset")[:2]):
        if old.shape == (5, 4):
            assert not new[:, 2].any(), path
        if old.shape == (4, 6):
            assert not new[[0, 3]].any(), path


def test_a_count_that_restarts_at_the_thaw():
    trainable = partition(weights()).trainable
    optimizer, plan = adamw(), one_switch(**SWITCH)
    state = own_state(optimizer)(trainable)
    gentle = 0.1 / (1 - 0.9**6) / (0.001 / (1 - 0.999**6)) ** 0.5
    for rule, counts, first in (("reset", [1, 2, 3, 4, 5, 6], gentle), ("reset_thawed", [-4, -3, -2, -1, 0, 1], 1.0)):
        own = project_optimizer_state(state, plan, rule=rule)
        moved, seen = [], []
        for _ in range(6):
            grads = tree_map(torch.ones_like, dict(trainable))
            updates, own = optimizer.update(grads, own, trainable, lr=1.0)
            moved.append(-updates["w"].b[0, 2].item())
            seen.append(own.count["w"].b[0, 2].item())
        assert seen == counts
        assert moved[:5] == [0] * 5
        assert moved[5] == pytest.approx(first, abs=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99, 1.0])
def test_pruning_is_relora_s(share):
    """``|x| > quantile(|x|, share)`` of a whole matrix where all of it is switched (arXiv:2307.05695's implementation),
    but that nothing is kept without its second moment; the share 1 leaves nothing, and 0 drops the smallest."""
    trainable = partition(weights()).trainable
    state = own_state(adamw())(trainable)
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
    """Of a G within the span of the old vectors, ``G a.T / rank`` becomes what it is with the new ones."""
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
    assert_same(before[:, 2] * (1 - 0.1 * 0.01), leaves[3].detach()[:, 2])  # weight decay alone: no moment is left
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


@pytest.mark.parametrize(
    ("transform", "kind", "settings"),
    [
        (sgd(momentum=0.9), torch.optim.SGD, {"momentum": 0.9}),
        (sgd(momentum=0.0), torch.optim.SGD, {}),
        (sgd(weight_decay=0.1), torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    ],
)
def test_sgd_is_torch_s(transform, kind, settings):
    trainable = partition(weights()).trainable
    leaves = [leaf.clone().requires_grad_() for leaf in tree_leaves(trainable)]
    optimizer, state = kind(leaves, lr=0.1, **settings), transform.init(trainable)
    for seed in range(4):
        grads = tree_map(lambda leaf: normal(seed, *leaf.shape), dict(trainable))  # noqa: B023, called at once
        for leaf, grad in zip(leaves, tree_leaves(grads), strict=True):
            leaf.grad = grad
        optimizer.step()
        updates, state = transform.update(grads, state, trainable, lr=0.1)
        trainable = apply_updates(trainable, updates)
        torch.testing.assert_close(tree_leaves(trainable), [leaf.detach() for leaf in leaves], rtol=1e-13, atol=1e-13)


def test_lion_is_its_paper_s():
    """Algorithm 2 of arXiv:2302.06675, in numbers by hand."""
    transform, param = lion(betas=(0.5, 0.75), weight_decay=0.5), {"w": torch.tensor([1.0, 2.0])}
    state = transform.init(param)
    updates, state = transform.update({"w": torch.tensor([4.0, -8.0])}, state, param, lr=0.1)
    torch.testing.assert_close(updates["w"], torch.tensor([-0.15, 0.0]))  # -(1 + 0.5) / 10, -(-1 + 1) / 10
    torch.testing.assert_close(state.mu["w"], torch.tensor([1.0, -2.0]))
    updates, state = transform.update({"w": torch.tensor([-0.5, 3.0])}, state, param, lr=0.1)
    torch.testing.assert_close(updates["w"], torch.tensor([-0.15, -0.2]))  # signs of 0.25 and 0.5
    torch.testing.assert_close(state.mu["w"], torch.tensor([0.625, -0.75]))


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_a_frozen_vector_stands_still_for_exactly_so_long(entry):
    transform, trainable = entry.transform, partition(weights()).trainable
    state = project_optimizer_state(own_state(transform)(trainable), one_switch(**SWITCH))
    for number in range(7):
        updates, state = transform.update(tree_map(torch.ones_like, dict(trainable)), state, trainable, lr=1.0)
        assert bool(updates["w"].b[:, 2].any()) == (number >= 5)
        assert updates["w"].b[:, 1].any()
