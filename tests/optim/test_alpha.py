"""Updates of weights with an alpha are those of the same weights with larger factors, or of the dense weights."""

from math import sqrt

import pytest
import torch

import dynlora_fn as dl
from dynlora_fn import Factors, LowRank, materialize, partition
from dynlora_fn.optim import average, compensate, muon, project_gradients
from dynlora_fn.testing import Shape, Storage, assert_same, low_rank, normal, optimizer_state

ALPHAS = (4.0, 0.3)
SHAPE = Shape(8, 12, 3)
STORAGES = [Storage("float64", None), Storage("int8", "bfloat16")]


def pair(alpha: float, stack: tuple[int, ...] = (2,), seed: int = 0, **settings: object) -> tuple[LowRank, LowRank]:
    """Return a weight with an alpha, and the same weight with an alpha of 1."""
    param = low_rank(SHAPE, stack, seed, alpha=alpha, **settings)
    root = sqrt(alpha)
    return param, param._replace(factors=Factors(root * param.factors.b, root * param.factors.a))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_decay_average_and_compensate_change_the_weight_alike(storage, alpha):
    weights, others = pair(alpha, storage=storage, waiting=4), pair(alpha, seed=1)
    assert_close(*weights)
    grad = normal(5, *weights[0].shape)
    for transform in (
        lambda param, _: dl.decay(param, 0.1),
        lambda param, other: average(param, other, decay=0.75),
        lambda param, _: compensate(param, grad, lr=0.1),
        lambda param, _: dl.merge(param),
        lambda param, _: dl.bases.fold_pending(param),
    ):
        assert_close(*(transform(*each) for each in zip(weights, others, strict=True)))


def assert_close(param: LowRank, plain: LowRank) -> None:
    torch.testing.assert_close(materialize(param), materialize(plain), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_an_average_with_a_dense_weight_is_that_of_the_weights(alpha):
    param, _ = pair(alpha)
    dense = normal(3, *param.shape)
    got = average(dense, param, decay=0.75)
    torch.testing.assert_close(got, 0.75 * dense + 0.25 * materialize(param))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_projected_gradients_are_those_of_the_factors(alpha):
    param, _ = pair(alpha)
    trainable, frozen = partition({"w": param})
    grad = normal(5, *param.shape)

    def loss(trainable):
        return (materialize(dl.combine(trainable, frozen))["w"] * grad).sum()

    wanted = torch.func.grad(loss)(trainable)
    got = project_gradients({"w": grad}, {"w": param})
    torch.testing.assert_close(got["w"][:2], wanted["w"][:2])
    assert got["w"].alpha == wanted["w"].alpha


@pytest.mark.parametrize("alpha", [*ALPHAS, -2.0])
def test_muon_moves_the_weight_as_far_for_every_alpha(alpha):
    """A negative alpha, as of an adapter that is subtracted, turns the gradients and not the direction."""
    param = low_rank(SHAPE, alpha=alpha)
    factors, root = param.factors, sqrt(abs(alpha))
    plain = param._replace(factors=Factors(root * factors.b, (root if alpha > 0 else -root) * factors.a))
    torch.testing.assert_close(materialize(param), materialize(plain))
    grad = normal(5, *param.shape)
    moved = []
    for each in (param, plain):
        trainable, frozen = partition({"w": each})
        optimizer = muon()
        grads = project_gradients({"w": grad}, {"w": each})
        updates, _ = optimizer.update(grads, optimizer.init(trainable), trainable, lr=1e-3)
        moved.append(materialize(dl.combine(dl.apply_updates(trainable, updates), frozen))["w"])
    torch.testing.assert_close(*moved)
    assert (moved[0] - materialize(param)).norm() > 1e-3


@pytest.mark.parametrize("alpha", ALPHAS)
def test_adamw_moves_the_weight_alpha_times_as_far(alpha):
    """Every entry of the factors moves by the rate, as in PEFT."""
    param = low_rank(SHAPE, alpha=alpha)
    plain = param._replace(factors=Factors(param.factors.b, param.factors.a))
    grad, steps = normal(5, *param.shape), []
    for each in (param, plain):
        trainable, frozen = partition({"w": each})
        optimizer = dl.optim.adamw(eps=0)
        grads = project_gradients({"w": grad}, {"w": each})
        updates, _ = optimizer.update(grads, optimizer.init(trainable), trainable, lr=1e-6)
        new = materialize(dl.combine(dl.apply_updates(trainable, updates), frozen))["w"]
        steps.append(new - materialize(each))
    torch.testing.assert_close(steps[0], alpha * steps[1], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("moments", ["float32", "8bit"])
@pytest.mark.parametrize("rule", ["reset", "reset_thawed", "keep", "prune"])
def test_projected_states_keep_their_alpha(rule, moments):
    params = {"w": low_rank(Shape(64, 64, 4), alpha=0.3, factor_dtype=torch.float32)}
    state = optimizer_state(params, steps=2, optimizer=dl.optim.adamw(moments=moments))
    plan = dl.schedules.every(1)(0, params)
    new = dl.project_optimizer_state(state, plan, rule=rule)
    assert new.inner.mu["w"].alpha == state.inner.mu["w"].alpha
    plain = {"w": params["w"]._replace(factors=Factors(params["w"].factors.b, params["w"].factors.a))}
    wanted = dl.project_optimizer_state(
        optimizer_state(plain, steps=2, optimizer=dl.optim.adamw(moments=moments)), plan, rule=rule
    )
    assert_same(new.inner.mu["w"][:2], wanted.inner.mu["w"][:2])
    assert_same(new.frozen_for, wanted.frozen_for)


def test_transport_reads_vectors_and_not_their_scale():
    params = {"w": low_rank(SHAPE, alpha=0.3)}
    plan = dl.schedules.every(1)(0, params)
    state = optimizer_state(params, steps=2)
    after, _ = dl.switch(params, plan)
    new = dl.project_optimizer_state(state, plan, rule="transport", change=dl.optim.Change(params, after))
    assert new.inner.mu["w"].alpha == params["w"].factors.alpha
