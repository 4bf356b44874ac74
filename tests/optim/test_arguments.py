"""What every optimizer refuses: decay of factors, and gradients that are not those of the parameters."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dynlora_fn.optim import SignedMoment, adamw, freeze_counterparts, lion, multi_transform, muon, sgd
from dynlora_fn.parallel import ShardedFactors, Sharding
from dynlora_fn.testing import Shape, assert_same, low_rank, normal
from tests.support.optimizer_table import OPTIMIZERS
from tests.support.optimizers import some_trainable

TRAINABLE = some_trainable()
FACTORS = TRAINABLE["w"]


@pytest.mark.parametrize("make", [adamw, sgd, lion, muon])
def test_weight_decay_of_factors_is_refused(make: Any):
    message = r"`weight_decay` is 0\.1, but it cannot decay the weight 'w' .*`dl\.optim\.decay\(params, rate\)`"
    decaying = make(weight_decay=0.1)
    with pytest.raises(ValueError, match=message):
        decaying.init({"w": FACTORS})
    with pytest.raises(ValueError, match=message):
        decaying.update({"w": FACTORS}, make().init({"w": FACTORS}), {"w": FACTORS}, lr=0.1)


@pytest.mark.parametrize("make", [adamw, sgd, lion, muon])
def test_weight_decay_of_full_rank_tensors_stays(make: Any):
    trainable = {"matrix": normal(0, 4, 3)}
    zeros = {"matrix": torch.zeros(4, 3, dtype=torch.float64)}
    decaying = make(weight_decay=0.1)
    updates, _ = decaying.update(zeros, decaying.init(trainable), trainable, lr=0.5)
    torch.testing.assert_close(updates["matrix"], -0.5 * 0.1 * trainable["matrix"])


def test_factors_and_tensors_may_be_decayed_in_their_own_ways():
    transforms = {"tensors": adamw(weight_decay=0.1), "factors": adamw(factor_decay=0.2)}
    optimizer = multi_transform(transforms, lambda name, leaf: "tensors" if isinstance(leaf, Tensor) else "factors")
    grads = tree_map(torch.zeros_like, TRAINABLE)
    updates, _ = optimizer.update(grads, optimizer.init(TRAINABLE), TRAINABLE, lr=1.0)
    torch.testing.assert_close(updates["bias"], -0.1 * TRAINABLE["bias"])
    torch.testing.assert_close(updates["w"].b, -0.2 * FACTORS.b)
    torch.testing.assert_close(updates["w"].a, -0.2 * FACTORS.a)


def test_factor_decay_leaves_full_rank_tensors():
    optimizer, zeros = adamw(factor_decay=0.2), {"bias": torch.zeros(5)}
    updates, _ = optimizer.update(zeros, optimizer.init(zeros), {"bias": torch.ones(5)}, lr={"bias": 1.0})
    assert not updates["bias"].any()


WRONG = {
    "no axes": ({"bias": torch.tensor(1.0)}, "has 'bias' of shape () for a parameter of shape (5,)"),
    "one row": (
        {"w": FACTORS._replace(b=FACTORS.b[:1])},
        "has 'w' of shape (1, 4), (4, 6) for a parameter of shape (5, 4)",
    ),
    "one column": ({"w": FACTORS._replace(a=FACTORS.a[:, :1])}, "has 'w' of shape (5, 4), (4, 1) for"),
    "another axis": ({"bias": torch.ones(2, 5)}, "has 'bias' of shape (2, 5) for a parameter of shape (5,)"),
    "a dense gradient": ({"w": torch.ones(5, 6)}, "has a Tensor for 'w', which is a Factors in `trainable`"),
    "another name": ({"head": torch.ones(5)}, "must have the names of `trainable`, but only one of them has ['head']"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "a user's"])
def test_gradients_of_other_shapes_are_refused(name: str, change: dict, message: str):
    """They would be broadcast, so that all rows get the same update."""
    optimizer = freeze_counterparts(sgd()) if name == "a user's" else OPTIMIZERS[name].transform
    with pytest.raises(ValueError, match=r"`grads` " + re.escape(message)):
        optimizer.update({**TRAINABLE, **change}, optimizer.init(TRAINABLE), TRAINABLE, lr=0.1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_missing_gradient_is_refused(name: str):
    optimizer = OPTIMIZERS[name].transform
    grads = {name: leaf for name, leaf in TRAINABLE.items() if name != "w"}
    with pytest.raises(ValueError, match="'w'"):
        optimizer.update(grads, optimizer.init(TRAINABLE), TRAINABLE, lr=0.1)


def test_gradients_of_another_type_are_refused_by_name():
    sharded = ShardedFactors(*FACTORS, Sharding("group", 1, 0, 5, columns=6))
    grads = {**TRAINABLE, "w": sharded}
    with pytest.raises(ValueError, match=r"`grads` has a ShardedFactors for 'w', which is a Factors in `trainable`"):
        adamw().update(grads, adamw().init(TRAINABLE), TRAINABLE, lr=0.1)


IN_8_BIT = SignedMoment(torch.ones(5, dtype=torch.uint8), torch.ones(1))
STATES = {
    "a moment of one row": lambda state: replaced(state, "mu", "w", FACTORS._replace(b=FACTORS.b[:1])),
    "a moment of another weight": lambda state: replaced(state, "mu", "bias", torch.ones(4)),
    "a moment of no parameter": lambda state: replaced(state, "mu", "head", torch.ones(4)),
    "a moment that is a number": lambda state: replaced(state, "mu", "bias", 0.0),
    "a dense moment of factors": lambda state: replaced(state, "mu", "w", torch.ones(5, 6)),
    "a moment of flags": lambda state: replaced(state, "mu", "bias", torch.ones(5, dtype=torch.bool)),
    "a moment in 8 bit": lambda state: replaced(state, "mu", "bias", IN_8_BIT),
    "a counter of each entry": lambda state: state._replace(frozen_for={"w": FACTORS}),
    "no counters": lambda state: state._replace(frozen_for={}),
    "the state inside": lambda state: state.inner,
    "no state": lambda state: None,
}


def replaced(state: Any, field: str, name: str, leaf: Any) -> Any:
    tree = {**getattr(state.inner, field), name: leaf}
    return state._replace(inner=state.inner._replace(**{field: tree}))


@pytest.mark.parametrize("change", STATES.values(), ids=STATES)
@pytest.mark.parametrize("make", [adamw, sgd, lion])
def test_states_of_other_parameters_are_refused(make: Any, change: Any):
    """Moments of another shape would be broadcast."""
    optimizer = make()
    state = change(optimizer.init(TRAINABLE))
    with pytest.raises((TypeError, ValueError), match=r"`opt_state"):
        optimizer.update(TRAINABLE, state, TRAINABLE, lr=0.1)


@pytest.mark.parametrize("lr", [math.nan, math.inf, -0.1, 1j, "0.1", None, True, torch.ones(5), torch.tensor(1j)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learning_rates_that_cannot_be_right_are_refused(name: str, lr: Any):
    optimizer = OPTIMIZERS[name].transform
    for rate in (lr, {"w": 0.1, "bias": lr, "scale": 0.1}):
        with pytest.raises((TypeError, ValueError), match="`lr` "):
            optimizer.update(TRAINABLE, optimizer.init(TRAINABLE), TRAINABLE, lr=rate)


@pytest.mark.parametrize("lr", [{"w": 0.1}, {"w": 0.1, "bias": 0.1, "scale": 0.1, "head": 0.1}])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learning_rates_have_the_names_of_the_parameters(name: str, lr: Any):
    optimizer = OPTIMIZERS[name].transform
    with pytest.raises(ValueError, match=r"`lr` has (no rate for \['bias', 'scale'\]|a rate for \['head'\])"):
        optimizer.update(TRAINABLE, optimizer.init(TRAINABLE), TRAINABLE, lr=lr)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_numbers_of_numpy_are_numbers(name: str):
    optimizer = OPTIMIZERS[name].transform
    state = optimizer.init(TRAINABLE)
    got, wanted = (optimizer.update(TRAINABLE, state, TRAINABLE, lr=lr).updates for lr in (np.float64(0.125), 0.125))
    assert_same(got, wanted)


def test_parameters_in_place_of_the_trainable_tree_are_refused():
    params = {"w": low_rank(Shape(5, 6, 4))}
    with pytest.raises(TypeError, match=r"`trainable` has LowRank.* for 'w'; use factors or a tensor, such as of"):
        adamw().init(params)
