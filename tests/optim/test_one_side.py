"""Optimizers of weights that train only `b`."""

from math import sqrt

import pytest
import torch
from hypothesis import strategies as st
from torch.utils._pytree import tree_map

import dynlora_fn as dl
from dynlora_fn import materialize, partition
from dynlora_fn.optim import average, clip_by_global_norm, compensate, muon, project_gradients
from dynlora_fn.switching import OneSidedFactors
from dynlora_fn.testing import (
    Shape,
    assert_same,
    check_state_projection,
    low_rank,
    low_rank_params,
    normal,
    optimizer_state,
    optimizer_states,
    plan_of,
    plans,
)
from tests.support.optimizer_table import OPTIMIZERS

SHAPE = Shape(8, 12, 3)


def grads_of(params, grad):
    return project_gradients({"w": grad}, params)


def kinds(tree):
    return tree_map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def with_both(param):
    return {"w": param._replace(factors=dl.Factors(param.factors.b, param.factors.a))}


def moved(param, optimizer, grad, lr):
    """Return by how much a step moves the weight."""
    params = {"w": param}
    trainable, frozen = partition(params)
    updates, _ = optimizer.update(grads_of(params, grad), optimizer.init(trainable), trainable, lr=lr)
    return materialize(dl.combine(dl.apply_updates(trainable, updates), frozen))["w"] - materialize(param)


@pytest.mark.parametrize("alpha", [1.0, 4.0, -2.0])
@pytest.mark.parametrize("shape", [SHAPE, Shape(12, 8, 8), Shape(6, 9, 1)])
@pytest.mark.parametrize("options", [{}, {"coefficients": "polar_express_8", "nesterov": False, "coupled": 1}])
def test_muon_takes_the_orthogonalized_step_within_the_rows(options, shape, alpha):
    """Its singular values are those that muon gives a dense weight."""
    param, optimizer = low_rank(shape, alpha=alpha, trained="b"), muon(**options)
    grad, rows = normal(5, *param.shape), param.factors.a * sqrt(abs(alpha) / shape.rank)
    within = {"w": grad @ rows.mT @ rows}
    dense = optimizer.update(within, optimizer.init(within), within, lr=0.1)[0]["w"]
    torch.testing.assert_close(moved(param, optimizer, grad, 0.1), dense, rtol=1e-6, atol=1e-8)


def test_muon_takes_the_step_of_both_sides_for_b():
    """Whitening by the Gram matrix of orthogonal rows is a division, except for damping by a thousandth."""
    param, grad = low_rank(Shape(8, 12, 3), trained="b"), normal(5, 8, 12)
    both = with_both(param)
    trainable, _ = partition(both)
    updates, _ = muon().update(grads_of(both, grad), muon().init(trainable), trainable, lr=1e-4)
    got = moved(param, muon(), grad, 1e-4)
    torch.testing.assert_close(got, updates["w"].b @ param.factors.a / 3, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 4, 8])
@pytest.mark.parametrize("alpha", [1.0, 4.0])
def test_adamw_moves_the_weight_as_far_at_every_rank(rank, alpha):
    param = low_rank(Shape(8, 12, rank), alpha=alpha, trained="b")
    change = moved(param, dl.optim.adamw(eps=0), normal(5, 8, 12), 1e-3)
    torch.testing.assert_close(change.norm(), torch.tensor(1e-3 * sqrt(alpha * 8), dtype=torch.float64))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_projection_changes_only_the_counterparts(name):
    params = low_rank_params(trained="b")
    optimizer = OPTIMIZERS[name].transform

    def with_state(param):
        states = optimizer_states({"w": param}, optimizer=optimizer)
        return st.tuples(states, plans(param).map(lambda plan: {"w": plan}))

    check_state_projection(dl.project_optimizer_state, arguments=params.flatmap(with_state), examples=20)


@pytest.mark.parametrize("moments", ["float32", "8bit"])
@pytest.mark.parametrize("rule", ["reset", "reset_thawed", "keep", "prune", "transport"])
def test_every_rule_treats_b_as_with_both_sides(rule, moments):
    param = low_rank(Shape(1024, 8, 4), factor_dtype=torch.float32, trained="b")
    plan = {"w": plan_of(4, b=0, a=2)}
    after = dl.switch(param, plan["w"]).param
    new = []
    for change in (dl.optim.Change({"w": param}, {"w": after}), dl.optim.Change(with_both(param), with_both(after))):
        params, optimizer = change.before, dl.optim.adamw(moments=moments)
        trainable = partition(params).trainable
        _, state = optimizer.update(grads_of(params, normal(3, 1024, 8)), optimizer.init(trainable), trainable, lr=0.1)
        settings = {"change": change} if rule == "transport" else {}
        if rule == "transport" and moments == "8bit":
            with pytest.raises(ValueError, match="'w'"):
                dl.project_optimizer_state(state, plan, rule=rule, **settings)
            return
        new.append(dl.project_optimizer_state(state, plan, rule=rule, **settings))
    assert_same([tree["w"].b for tree in new[0].inner], [tree["w"].b for tree in new[1].inner])
    assert_same(new[0].frozen_for["w"].b, new[1].frozen_for["w"].b)


def test_a_frozen_vector_does_not_move():
    params = {"w": low_rank(SHAPE, trained="b")}
    plan = {"w": plan_of(3, b=0, a=1, frozen_for=2)}
    optimizer = dl.optim.adamw()
    trainable, grads = partition(params).trainable, grads_of(params, normal(1, 8, 12))
    state = dl.project_optimizer_state(optimizer.init(trainable), plan)
    slot = int(plan["w"].a.slots[0])
    moves = []
    for _ in range(4):
        updates, state = optimizer.update(grads, state, trainable, lr=0.1)
        moves.append(updates["w"].b.any(0).tolist())
    assert [move[slot] for move in moves] == [False, False, True, True]
    assert all(sum(move) >= 2 for move in moves)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resized_state_is_fresh(name):
    params = {"w": low_rank(SHAPE, trained="b"), "v": low_rank(SHAPE, seed=1, trained="b")}
    optimizer = OPTIMIZERS[name].transform
    state = optimizer_state(params, steps=2, optimizer=optimizer)
    new, resized = dl.resize(params, state, rank={"w": 5})
    assert_same(materialize(new["v"]), materialize(params["v"]))
    trainable = partition(new).trainable
    grads = {name: project_gradients({name: normal(2, 8, 12)}, {name: new[name]})[name] for name in new}
    updates, _ = optimizer.update(grads, resized, trainable, lr=0.1)
    fresh, _ = optimizer.update(grads, optimizer.init(trainable), trainable, lr=0.1)
    assert_same(updates["w"], fresh["w"])


@pytest.mark.parametrize("rank", [4, 16])
def test_a_resized_state_in_8_bit_has_codes(rank):
    """A step that is compiled for the new rank has the same state before and after."""
    params = {"w": low_rank(Shape(1024, 16, 8), trained="b")}
    for optimizer in (muon(moments="8bit"), dl.optim.adamw(moments="8bit")):
        new, resized = dl.resize(params, optimizer_state(params, steps=1, optimizer=optimizer), rank=rank)
        fresh = optimizer.init(partition(new).trainable)
        assert kinds(resized.inner) == kinds(fresh.inner)
        assert resized.inner.mu["w"].b.codes.unique().numel() == 1


def test_gradients_are_clipped_by_the_norm_of_one_side():
    params = {"w": low_rank(SHAPE, trained="b")}
    grads = grads_of(params, normal(1, 8, 12))
    clipped = clip_by_global_norm(grads, 0.1)
    torch.testing.assert_close(clipped.norm.double(), grads["w"].b.norm())
    torch.testing.assert_close(clipped.grads["w"].b.norm(), torch.tensor(0.1, dtype=torch.float64), rtol=1e-4, atol=0)


def test_projected_gradients_are_those_of_b():
    params = {"w": low_rank(SHAPE, (2,), trained="b", alpha=0.3)}
    trainable, frozen = partition(params)
    grad = normal(5, 2, 8, 12)
    wanted = torch.func.grad(lambda tree: (materialize(dl.combine(tree, frozen))["w"] * grad).sum())(trainable)
    got = grads_of(params, grad)
    assert type(got["w"]) is OneSidedFactors
    torch.testing.assert_close(got["w"].b, wanted["w"].b)


def test_compensation_adds_all_that_is_outside_of_the_rows():
    param, grad = low_rank(SHAPE, trained="b"), normal(5, 8, 12)
    change = materialize(param) - materialize(compensate(param, grad, lr=0.1))
    rows = param.factors.a / sqrt(3)
    outside = grad - grad @ rows.mT @ rows
    wanted = outside / outside.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(
        materialize(param) - materialize(compensate(param, grad, lr=0.1, normalize="rows")), 0.1 * wanted
    )
    assert float((change @ rows.mT).norm()) < 1e-9 < float(change.norm())


@pytest.mark.parametrize("waiting", [0, 6])
def test_an_average_is_that_of_the_weights_and_its_rows_are_orthogonal(waiting):
    one, two = (low_rank(SHAPE, seed=seed, trained="b", waiting=waiting) for seed in (0, 1))
    new = average(one, two, decay=0.75)
    torch.testing.assert_close(materialize(new), 0.75 * materialize(one) + 0.25 * materialize(two))
    assert_same(new.factors.a, two.factors.a)
    with pytest.raises(ValueError, match="OneSidedFactors"):
        average(one, low_rank(SHAPE), decay=0.5)


def test_an_average_keeps_its_value_when_a_step_overwrites_the_run():
    """The step donates its state, and switches rows of `a` in the same memory."""
    params = {"w": low_rank(SHAPE, factor_dtype=torch.float32, trained="b")}
    averaged = dl.optim.average(params, dl.decay(params, 0.1), decay=0.5)
    averaged = dl.optim.average(averaged, params, decay=0.5)
    before = materialize(averaged["w"])

    def step(params):
        return dl.switch(params, dl.schedules.every(1)(0, params)).params, None

    new, _ = dl.compile_step(step, backend="aot_eager")(params)
    assert not torch.equal(new["w"].factors.a, averaged["w"].factors.a)
    assert torch.equal(materialize(averaged["w"]), before)


def test_states_of_other_libraries_are_refused_by_name():
    params = {"w": low_rank(SHAPE, trained="b")}
    trainable = partition(params).trainable
    leaf = trainable["w"].b.clone().requires_grad_()
    optimizer = torch.optim.AdamW([leaf])
    leaf.sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="'w'"):
        dl.project_optimizer_state(optimizer.state_dict(), {"w": plan_of(3, b=0, a=1)}, trainable=trainable)
