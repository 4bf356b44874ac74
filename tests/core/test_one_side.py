"""Trees of weights that train only `b`."""

import pytest
import torch

import dynlora_fn as dl
from dynlora_fn._core._torch import tree_leaves
from dynlora_fn._core._types import FixedSide, OneSidedFactors, sides_of
from dynlora_fn.testing import Shape, assert_same, low_rank

PARAM = low_rank(Shape(6, 4, 2), alpha=3.0, trained="b")
BOTH = dl.switching.ScaledFactors(*sides_of(PARAM.factors), dl.switching.Alpha(3))
TRAINABLE, FROZEN = dl.partition({"w": PARAM})


def loss(trainable):
    return dl.materialize(dl.combine(trainable, FROZEN))["w"].square().sum()


def test_a_is_in_the_frozen_tree():
    assert [leaf.shape for leaf in tree_leaves(TRAINABLE)] == [(6, 2)]
    assert_same(FROZEN["w"].a, PARAM.factors.a)
    assert_same(dl.combine(TRAINABLE, FROZEN), {"w": PARAM})


def test_gradients_moments_and_updates_have_one_tensor():
    grads = torch.func.grad(loss)(TRAINABLE)
    state = dl.optim.adamw().init(TRAINABLE)
    updates, state = dl.optim.adamw().update(grads, state, TRAINABLE, lr=0.1)
    for tree in (grads, updates, *state.inner, state.frozen_for, dl.apply_updates(TRAINABLE, updates)):
        assert type(tree["w"]) is OneSidedFactors
        assert len(tree_leaves(tree)) == 1
        assert tree["w"].fixed == PARAM.factors.fixed


def test_the_gradient_is_that_of_both_sides():
    both = dl.LowRank(
        PARAM.base, dl.switching.ScaledFactors(*sides_of(PARAM.factors), dl.switching.Alpha(3)), PARAM.seed
    )
    trainable, frozen = dl.partition({"w": both})
    grads = torch.func.grad(lambda tree: dl.materialize(dl.combine(tree, frozen))["w"].square().sum())(trainable)
    torch.testing.assert_close(torch.func.grad(loss)(TRAINABLE)["w"].b, grads["w"].b)


@pytest.mark.parametrize(
    ("trainable", "frozen"),
    [
        ({"w": PARAM.factors}, FROZEN),
        (TRAINABLE, {"w": FROZEN["w"]._replace(a=())}),
        ({"w": BOTH}, FROZEN),
    ],
)
def test_trees_that_do_not_fit_each_other_are_refused_by_name(trainable, frozen):
    with pytest.raises(ValueError, match="'w'"):
        dl.combine(trainable, frozen)


@pytest.mark.parametrize(
    "factors",
    [
        PARAM.factors._replace(a=()),
        PARAM.factors._replace(fixed=None),
        PARAM.factors._replace(fixed=FixedSide(5)),
        PARAM.factors._replace(a=None),
    ],
)
def test_factors_that_are_no_weight_are_refused_by_name(factors):
    with pytest.raises((ValueError, TypeError), match="'w'"):
        dl.materialize({"w": PARAM._replace(factors=factors)})


def test_a_state_of_both_sides_is_refused_by_name():
    both = dl.optim.adamw().init({"w": dl.Factors(PARAM.factors.b, PARAM.factors.a)})
    with pytest.raises(ValueError, match="'w'"):
        dl.optim.adamw().update(TRAINABLE, both, TRAINABLE, lr=0.1)
    with pytest.raises(ValueError, match="'w'"):
        dl.apply_updates(TRAINABLE, {"w": dl.Factors(PARAM.factors.b, PARAM.factors.a)})
