"""Updates can be differentiated: by finite differences through three steps, and finite where gradients are zero."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp
from torch.utils._pytree import tree_leaves, tree_map

import dynlora_fn as dl
from dynlora_fn import Factors, LowRank, apply_updates, combine, linear, partition, project_optimizer_state, switch
from dynlora_fn.optim import (
    Transform,
    Updates,
    adamw,
    clip_by_global_norm,
    compensate,
    lion,
    multi_transform,
    muon,
    sgd,
)
from dynlora_fn.testing import Shape, assert_same, assert_within, low_rank, normal, plan_of
from tests.support.optimizer_table import OPTIMIZERS

SHAPE, RANK = Shape(6, 5, 2), 2
X, Y = normal(50, 7, 5), normal(51, 7, 6)
PLANS = [{"w": plan_of(RANK, b=1, a=0, seed=seed, frozen_for=1)} for seed in range(3)]


def clipped(inner: Transform) -> Transform:
    def update(grads: Any, opt_state: Any, trainable: Any, *, lr: Any) -> Updates:
        return inner.update(clip_by_global_norm(grads, 0.5).grads, opt_state, trainable, lr=lr)

    return Transform(inner.init, update)


def only_factors(optimizer: Transform) -> Transform:
    return multi_transform(
        {"factors": optimizer, "sgd": sgd()}, lambda name, leaf: "sgd" if isinstance(leaf, Tensor) else "factors"
    )


# A large `eps`, so that what is compared with finite differences has no kinks near zero.
SMOOTH = {
    "adamw": adamw(eps=0.5),
    "adamw with decay": only_factors(adamw(eps=0.5, factor_decay=0.1)),
    "sgd": sgd(),
    "lion": lion(),
    "muon": OPTIMIZERS["muon"].transform,
    "muon, coupled": OPTIMIZERS["muon, coupled"].transform,
    "clipped sgd": clipped(sgd()),
    "clipped adamw": clipped(adamw(eps=0.5)),
}


def loss_fn(params: dict[str, Any]) -> Tensor:
    return (linear(X, params["w"], params["bias"]) - Y).square().mean()


def after_steps(optimizer: Transform, param: LowRank, trainable: Any, lr: Any = 0.05, steps: int = 3) -> Tensor:
    """Return the loss after steps that switch before the update."""
    frozen, opt_state = partition({"w": param}).frozen, optimizer.init(trainable)
    for plan in PLANS[:steps]:
        grads = dl.value_and_grad(lambda trainable: loss_fn(combine(trainable, frozen)))(trainable).grads  # noqa: B023
        trainable, frozen = partition(switch(combine(trainable, frozen), plan).params)
        opt_state = project_optimizer_state(opt_state, plan)
        updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=lr)
        trainable = apply_updates(trainable, updates)
    return loss_fn(combine(trainable, frozen))


def start(*, is_lora: bool = False) -> tuple[LowRank, dict[str, Any]]:
    param = low_rank(SHAPE)
    if is_lora:
        param = param._replace(factors=Factors(torch.zeros_like(param.factors.b), param.factors.a))
    return param, {"w": param.factors, "bias": normal(3, 6)}


def directional(gradient: Any, direction: Any) -> Tensor:
    pairs = zip(tree_leaves(gradient), tree_leaves(direction), strict=True)
    return sum(((left * right).sum() for left, right in pairs), torch.zeros((), dtype=torch.float64))


def difference(function: Callable[[Any], Tensor], at: Any, direction: Any, by: float = 1e-6) -> Tensor:
    high, low = (
        function(tree_map(lambda leaf, d: leaf + sign * by * d, at, direction))  # noqa: B023
        for sign in (1, -1)
    )
    return (high - low) / (2 * by)


@pytest.mark.parametrize("is_lora", [False, True])
@pytest.mark.parametrize("optimizer", SMOOTH.values(), ids=SMOOTH)
def test_gradients_through_three_switched_steps_are_finite_differences(optimizer, is_lora):
    if is_lora and optimizer in (SMOOTH["muon"], SMOOTH["muon, coupled"], SMOOTH["lion"]):
        pytest.skip("their updates jump where a gradient is zero; the next test covers them")
    param, trainable = start(is_lora=is_lora)
    loss = partial(after_steps, optimizer, param)
    direction = tree_map(lambda leaf: normal(9, *leaf.shape), trainable)
    wanted = difference(loss, trainable, direction)
    gradient = grad(loss)(trainable)
    # Of the third derivative, and rounding of the loss divided by the step.
    bound = 1e-6 * max(1.0, float(wanted.abs()))
    assert_within(directional(gradient, direction), wanted, bound)
    assert_within(jvp(loss, (trainable,), (direction,))[1], wanted, bound)
    attached = tree_map(lambda leaf: leaf.clone().requires_grad_(), trainable)
    by_autograd = torch.autograd.grad(loss(attached), tree_leaves(attached))
    for left, right in zip(by_autograd, tree_leaves(gradient), strict=True):
        assert_within(left, right, 1e-9 * max(1.0, float(right.abs().max())))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_are_finite_where_factors_start_at_zero(name):
    param, trainable = start(is_lora=True)
    loss = partial(after_steps, OPTIMIZERS[name].transform, param)
    gradient, tangent = grad(loss)(trainable), jvp(loss, (trainable,), (trainable,))[1]
    assert all(leaf.isfinite().all() for leaf in tree_leaves((gradient, tangent)))


@pytest.mark.parametrize("optimizer", SMOOTH.values(), ids=SMOOTH)
def test_the_learning_rate_has_a_gradient(optimizer):
    param, trainable = start()
    loss = partial(after_steps, optimizer, param, trainable)
    rate = torch.tensor(0.05, dtype=torch.float64)
    wanted = (loss(0.05 + 1e-6) - loss(0.05 - 1e-6)) / 2e-6
    assert_within(grad(loss)(rate), wanted, 1e-6 * max(1.0, float(wanted.abs())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_derivative_of_the_first_update_is_that_of_a_gradient_over_eps(dtype):
    """Where a gradient is zero, the update is ``-lr * grad / eps`` to first order."""
    optimizer, trainable = adamw(eps=0.25), {"w": torch.ones(3, dtype=dtype)}

    def update(grads: Tensor) -> Tensor:
        return optimizer.update({"w": grads}, optimizer.init(trainable), trainable, lr=0.5).updates["w"]

    zeros, ones = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)
    for derivative in (grad(lambda grads: update(grads).sum())(zeros), jvp(update, (zeros,), (ones,))[1]):
        torch.testing.assert_close(derivative, -2 * ones)
    second = grad(lambda grads: grad(lambda grads: update(grads).square().sum())(grads).sum())(zeros)
    torch.testing.assert_close(second, 8 * ones)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_has_the_same_bits_when_it_is_differentiated(name):
    optimizer, (_, trainable) = OPTIMIZERS[name].transform, start()
    grads = tree_map(lambda leaf: normal(4, *leaf.shape).where(normal(5, *leaf.shape) > 0, 0), trainable)

    def update(grads: Any) -> Any:
        return optimizer.update(grads, optimizer.init(trainable), trainable, lr=0.1)

    attached = tree_map(lambda leaf: leaf.clone().requires_grad_(), grads)
    assert_same(tree_map(torch.detach, update(attached)), update(grads))


def test_a_norm_of_zero_has_the_derivative_zero():
    zeros = {"w": torch.zeros(3), "v": torch.zeros(2)}
    for loss, wanted in (
        (lambda grads: clip_by_global_norm(grads, 1.0).norm, torch.zeros(3)),
        (lambda grads: clip_by_global_norm(grads, 1.0).grads["w"].sum(), torch.ones(3)),
    ):
        assert_same(grad(loss)(zeros)["w"], wanted)


@pytest.mark.parametrize("optimizer", [adamw(moments="8bit"), muon(moments="8bit")], ids=["adamw", "muon"])
def test_moments_in_8_bits_must_not_be_differentiated(optimizer: Transform):
    trainable = {"w": torch.ones(64, 64)}
    opt_state = optimizer.init(trainable)

    def update(grads: Tensor) -> Tensor:
        return optimizer.update({"w": grads}, opt_state, trainable, lr=0.1).updates["w"]

    refusal = pytest.raises(
        NotImplementedError, match=r"a moment of 'w' in 8 bits requires a gradient .*; use moments="
    )
    with refusal:
        grad(lambda grads: update(grads).sum())(torch.ones(64, 64))
    with refusal:
        jvp(update, (torch.ones(64, 64),), (torch.ones(64, 64),))
    with refusal:
        update(torch.ones(64, 64).requires_grad_())
    with refusal, forward_ad.dual_level():
        update(forward_ad.make_dual(torch.ones(64, 64), torch.ones(64, 64)))
    with torch.no_grad():
        assert update(torch.ones(64, 64).requires_grad_()).any()


# --- compensate


def moved(grads: Tensor, param: LowRank, normalize: str, base: Tensor, b: Tensor, a: Tensor) -> Tensor:
    new = compensate({"w": param._replace(base=base, factors=Factors(b, a))}, {"w": grads}, lr=0.3, normalize=normalize)
    return (new["w"].base.sin() * normal(61, 6, 5)).sum()


@pytest.mark.parametrize("normalize", ["spectrum", "rows"])
def test_gradients_through_compensate_are_finite_differences(normalize):
    param, gradient = low_rank(SHAPE), normal(60, 6, 5)
    leaves = (gradient, param.base, *param.factors)
    direction = tuple(normal(70 + at, *leaf.shape) for at, leaf in enumerate(leaves))

    def loss(leaves: Any) -> Tensor:
        grads, *others = leaves
        return moved(grads, param, normalize, *others)

    wanted = difference(loss, leaves, direction)
    bound = 1e-6 * max(1.0, float(wanted.abs()))
    assert_within(directional(grad(loss)(leaves), direction), wanted, bound)
    assert_within(jvp(loss, (leaves,), (direction,))[1], wanted, bound)


@pytest.mark.parametrize("normalize", ["spectrum", "rows"])
def test_gradients_through_compensate_are_finite_where_vectors_or_gradients_are_zero(normalize):
    param, gradient = low_rank(SHAPE), normal(60, 6, 5)
    zero_b = torch.zeros_like(param.factors.b)
    one_zero = param.factors.b * torch.tensor([0.0, 1.0])
    for b, grads in ((zero_b, gradient), (one_zero, gradient), (param.factors.b, 0 * gradient)):
        leaves = grads, param.base, b, param.factors.a

        def loss(leaves: Any) -> Tensor:
            grads, *others = leaves
            return moved(grads, param, normalize, *others)

        derivatives = grad(loss)(leaves), jvp(loss, (leaves,), (leaves,))[1]
        assert all(leaf.isfinite().all() for leaf in tree_leaves(derivatives))
