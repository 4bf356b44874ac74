"""What every optimizer refuses: decay of factors, and gradients that are not those of the parameters."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dynlora_fn.optim import adamw, freeze_counterparts, lion, multi_transform, muon, sgd
from dynlora_fn.parallel import ShardedFactors, Sharding
from dynlora_fn.testing import normal
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
