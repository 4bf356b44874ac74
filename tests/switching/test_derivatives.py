"""Derivatives pass through every change of a weight with a plain base."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp

import dynlora_fn as dl
from dynlora_fn import Factors, LowRank, materialize, merge, switch
from dynlora_fn.bases import defer, fold_pending
from dynlora_fn.interop import resize
from dynlora_fn.optim import average
from dynlora_fn.switching import draw, fold, init_pool, put_back
from dynlora_fn.testing import Shape, assert_within, eps, low_rank, normal, plan_of

SHAPE, RANK = Shape(6, 5, 3), 3
PLANS = [plan_of(RANK, b=1, a=1, seed=seed) for seed in range(3)]
OTHER = low_rank(SHAPE, seed=7)
COTANGENT = normal(8, 6, 5)
EPS = eps(torch.float64)
Leaves = tuple[Tensor, Tensor, Tensor]  # base, b and a
Change = Callable[[LowRank], LowRank]


def switched(param: LowRank, count: int = 1) -> LowRank:
    for plan in PLANS[:count]:
        param = switch({"w": param}, {"w": plan}).params["w"]
    return param


def unchanged(base: Tensor, b: Tensor, a: Tensor) -> Tensor:
    return base + b @ a / RANK


KEEP: dict[str, Change] = {
    "nothing": lambda param: param,
    "switch": switched,
    "three switches": lambda param: switched(param, 3),
    "merge": lambda param: merge({"w": param})["w"],
    "switch and merge": lambda param: merge(switched(param)),
    "defer": lambda param: defer(param, vectors=4),
    "deferred switches": lambda param: switched(defer(param, vectors=4), 2),
    "folds of the oldest": lambda param: switched(defer(param, vectors=4), 3),
    "fold_pending": lambda param: fold_pending({"w": switched(defer(param, vectors=4))})["w"],
    "merge of deferred": lambda param: merge(switched(defer(param, vectors=4))),
    "a higher rank": lambda param: resize({"w": param}, rank=4).params["w"],
    "a lower rank": lambda param: resize({"w": switched(defer(param, vectors=4))}, rank=2).params["w"],
}
# Each changes the weight, to what the second function says.
MOVE: dict[str, tuple[Change, Callable[..., Tensor]]] = {
    "fold": (
        lambda param: fold(param, param.factors.b[:, :1], param.factors.a[1:2]),
        lambda base, b, a: unchanged(base, b, a) + b[:, :1] @ a[1:2] / RANK,
    ),
    "decay": (lambda param: dl.decay({"w": param}, 0.25)["w"], lambda *leaves: 0.75 * unchanged(*leaves)),
    "decay of deferred": (
        lambda param: dl.decay(switched(defer(param, vectors=4)), 0.25),
        lambda *leaves: 0.75 * unchanged(*leaves),
    ),
    "average of it": (
        lambda param: average({"w": param}, {"w": OTHER}, decay=0.75)["w"],
        lambda *leaves: 0.75 * unchanged(*leaves) + 0.25 * materialize(OTHER),
    ),
    "average with it": (
        lambda param: average({"w": OTHER}, {"w": switched(param)}, decay=0.75)["w"],
        lambda *leaves: 0.25 * unchanged(*leaves) + 0.75 * materialize(OTHER),
    ),
}
CASES = {name: (change, unchanged) for name, change in KEEP.items()} | MOVE
every_change = pytest.mark.parametrize(("change", "wanted"), CASES.values(), ids=CASES)


def leaves_of(param: LowRank) -> Leaves:
    return param.base, param.factors.b, param.factors.a


def weight_after(change: Change, *leaves: Tensor) -> Tensor:
    base, b, a = leaves
    return materialize(change(LowRank(base, Factors(b, a), torch.tensor(0))))


def loss_of(weight: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *leaves: (weight(*leaves).sin() * COTANGENT).sum()


def close(got: Any, wanted: Any) -> None:
    """Compare sums of some tens of products of magnitude 10."""
    for left, right in zip(got, wanted, strict=True):
        assert_within(left, right, 1e4 * EPS)


@every_change
def test_gradients_pass_by_base_and_factors(change, wanted):
    leaves = leaves_of(low_rank(SHAPE))
    loss, right = loss_of(lambda *leaves: weight_after(change, *leaves)), loss_of(wanted)
    expected = grad(right, argnums=(0, 1, 2))(*leaves)
    close(grad(loss, argnums=(0, 1, 2))(*leaves), expected)
    attached = [leaf.clone().requires_grad_() for leaf in leaves]
    close(torch.autograd.grad(loss(*attached), attached), expected)


@every_change
def test_tangents_and_second_derivatives_pass(change, wanted):
    leaves = leaves_of(low_rank(SHAPE))
    tangents = tuple(normal(20 + at, *leaf.shape) for at, leaf in enumerate(leaves))
    loss, right = loss_of(lambda *leaves: weight_after(change, *leaves)), loss_of(wanted)
    close(jvp(loss, leaves, tangents), jvp(right, leaves, tangents))
    second, expected = (jvp(grad(f, argnums=(0, 1, 2)), leaves, tangents)[1] for f in (loss, right))
    close(second, expected)


@pytest.mark.parametrize("change", ["merge", "switch", "deferred switches"])
def test_a_bfloat16_base_rounds_a_gradient_once(change):
    base, b, a = (leaf.float() for leaf in leaves_of(low_rank(SHAPE)))
    base = base.to(torch.bfloat16)

    def linear_loss(*leaves: Tensor) -> Tensor:
        return (weight_after(KEEP[change], *leaves) * COTANGENT).sum()

    got = grad(linear_loss, argnums=(0, 1, 2))(base, b, a)
    g = COTANGENT.float()
    for side, wanted in zip(got, (g, g @ a.mT / RANK, b.mT @ g / RANK), strict=True):
        assert_within(side.float(), wanted, 2**-7 * wanted.abs().max() * 3)
    tangents = base, b, a
    moved = jvp(linear_loss, (base, b, a), tangents)[1]
    assert_within(moved, (g * (base + 2 * b @ a / RANK)).sum(), 2**-7 * (g * base).abs().sum())


def test_a_base_in_half_precision_is_differentiated_where_it_is_converted():
    base, b, a = (leaf.float() for leaf in leaves_of(low_rank(SHAPE)))
    got = grad(lambda base: (materialize(LowRank(base, Factors(b, a), torch.tensor(0))) * COTANGENT).sum())(
        base.to(torch.bfloat16)
    )
    assert_within(got.double(), COTANGENT, 2**-8 * COTANGENT.abs().max())


def test_incoming_vectors_have_gradients_through_factors_and_base():
    """A switch keeps the weight, whatever enters: the two parts cancel."""
    param, plan = low_rank(SHAPE), PLANS[0]
    incoming = Factors(normal(1, 6, 1), normal(2, 1, 5))

    def parts(incoming: Factors) -> tuple[Tensor, Tensor]:
        new = switch(param, plan, incoming=incoming).param
        product = new.factors.b @ new.factors.a / RANK
        return (new.base * COTANGENT).sum(), (product * COTANGENT).sum()

    by_base, by_product = (grad(lambda incoming, at=at: parts(incoming)[at])(incoming) for at in range(2))
    for left, right in zip(by_base, by_product, strict=True):
        assert right.any()
        assert_within(left, -right, 1e3 * EPS)


def test_vectors_return_to_a_pool_with_their_gradients():
    param, plan = low_rank(SHAPE), PLANS[0]
    pool = init_pool({"w": param})["w"]

    def stored(factors: Factors) -> Tensor:
        outgoing = switch(param._replace(factors=factors), plan, incoming=draw(pool, plan)).outgoing
        return put_back(pool, plan, outgoing).a.vectors.square().sum()

    got = grad(stored)(param.factors)
    wanted = torch.zeros_like(param.factors.a)
    wanted[plan.a.slots] = 2 * param.factors.a[plan.a.slots]
    close(got, (torch.zeros_like(got.b), wanted))
    with pytest.raises(NotImplementedError, match=r"`outgoing` requires a gradient .*; pass donate=False"):
        grad(lambda vectors: put_back(pool, plan, vectors, donate=True).a.vectors.sum())(
            Factors(normal(1, 6, 1), normal(2, 1, 5))
        )
