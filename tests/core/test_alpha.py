"""Alpha belongs to the type of factors, and trees of other alphas are refused by name."""

import copy
import pickle

import pytest
import torch

import dynlora_fn as dl
from dynlora_fn import Factors, LowRank
from dynlora_fn._core._torch import tree_leaves, tree_map
from dynlora_fn._core._types import alpha_of, divisor_of
from dynlora_fn.switching import Alpha, ScaledFactors
from dynlora_fn.testing import Shape, assert_same, low_rank

PARAM = low_rank(Shape(6, 4, 2), alpha=4.0)
PLAIN = low_rank(Shape(6, 4, 2))
TRAINABLE, FROZEN = dl.partition({"w": PARAM})


def scaled(alpha: float) -> ScaledFactors:
    return ScaledFactors(PARAM.factors.b, PARAM.factors.a, Alpha(alpha))


def test_the_weight_is_multiplied_by_alpha_over_rank():
    b, a = PARAM.factors.b, PARAM.factors.a
    assert (PARAM.alpha, PARAM.divisor, PLAIN.alpha, PLAIN.divisor) == (4.0, 0.5, 1.0, 2)
    torch.testing.assert_close(dl.materialize(PARAM), PARAM.base + 2 * b @ a)
    assert type(divisor_of(8, 1.0)) is int  # so that graphs are those of a division by the rank


def test_gradients_and_moments_have_the_alpha_of_their_weight():
    def loss(trainable):
        return dl.materialize(dl.combine(trainable, FROZEN))["w"].square().sum()

    grads = torch.func.grad(loss)(TRAINABLE)
    assert grads["w"].alpha == Alpha(4)
    state = dl.optim.adamw().init(TRAINABLE)
    updates, state = dl.optim.adamw().update(grads, state, TRAINABLE, lr=0.1)
    assert [alpha_of(tree["w"]) for tree in (state.inner.mu, state.inner.nu, updates)] == [4.0] * 3
    assert alpha_of(dl.apply_updates(TRAINABLE, updates)["w"]) == 4.0


def test_alpha_is_no_leaf_and_survives_copies():
    assert len(tree_leaves(PARAM.factors)) == 2
    assert len(tree_leaves(FROZEN)) == 2
    for again in (copy.deepcopy(PARAM), pickle.loads(pickle.dumps(PARAM)), tree_map(torch.clone, PARAM)):
        assert_same(again, PARAM)
        assert again.alpha == 4.0
    assert_same(dl.combine(TRAINABLE, FROZEN)["w"], PARAM)
    assert dl.unstack({"*.w": low_rank(Shape(6, 4, 2), (3,), alpha=0.3)})["1.w"].alpha == 0.3


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "`alpha` is 0"),
        (float("nan"), ValueError, "`alpha` is nan"),
        (float("inf"), ValueError, "`alpha` is inf"),
        ("4", TypeError, "`alpha` is '4', which is not a real number"),
        (True, TypeError, "`alpha` is True, which is not a real number"),
    ],
)
def test_alpha_is_a_number(value, error, message):
    with pytest.raises(error, match=message):
        Alpha(value)


def test_a_bare_number_is_no_alpha():
    wrong = PARAM._replace(factors=ScaledFactors(PARAM.factors.b, PARAM.factors.a, 4.0))
    with pytest.raises(TypeError, match=r"`params` has 4\.0 as `alpha` of 'w'; use an Alpha"):
        dl.materialize({"w": wrong})


@pytest.mark.parametrize("other", [Factors(PARAM.factors.b, PARAM.factors.a), scaled(3.0)])
def test_factors_of_another_alpha_are_refused_by_name(other):
    found = alpha_of(other)
    with pytest.raises(ValueError, match=rf"`trainable` has factors of alpha {found} for 'w', .* `frozen` has alpha 4"):
        dl.combine({"w": other}, FROZEN)
    with pytest.raises(ValueError, match=rf"`updates` has alpha {found} for 'w', which has alpha 4.0 in `trainable`"):
        dl.apply_updates(TRAINABLE, {"w": other})
    optimizer = dl.optim.sgd()
    with pytest.raises(ValueError, match=rf"`grads` has alpha {found} for 'w', which has alpha 4.0 in `trainable`"):
        optimizer.update({"w": other}, optimizer.init(TRAINABLE), TRAINABLE, lr=0.1)
    with pytest.raises(ValueError, match=rf"`opt_state.mu` has alpha {found} for 'w', which has alpha 4.0"):
        optimizer.update(TRAINABLE, optimizer.init({"w": other}), TRAINABLE, lr=0.1)
    with pytest.raises(ValueError, match=rf"`averaged` has alpha 4.0 for 'w', which has alpha {found}"):
        dl.optim.average({"w": PARAM}, {"w": PARAM._replace(factors=other)}, decay=0.5)


def test_factors_that_lose_their_alpha_are_refused_where_the_weight_had_none():
    trainable, frozen = dl.partition({"w": PLAIN})
    with pytest.raises(ValueError, match=r"`trainable` has factors of alpha 4.0 for 'w', .* has alpha 1.0"):
        dl.combine({"w": ScaledFactors(*trainable["w"], Alpha(4))}, frozen)


def test_incoming_vectors_of_another_alpha_are_refused():
    plan = dl.schedules.every(1)(0, {"w": PARAM})
    _, outgoing = dl.switch({"w": PARAM}, plan)
    assert outgoing["w"].alpha == Alpha(4)
    dl.switch({"w": PARAM}, plan, incoming=outgoing)
    with pytest.raises(ValueError, match=r"`incoming` has alpha 4.0 for 'w', which has alpha 1.0 in `params`"):
        dl.switch({"w": PLAIN}, plan, incoming=outgoing)


def test_factors_unpack_only_where_they_have_no_alpha():
    b, a = PLAIN.factors
    assert LowRank(PLAIN.base, Factors(b, a), PLAIN.seed).alpha == 1
    with pytest.raises(ValueError, match="too many values to unpack"):
        b, a = PARAM.factors
