"""Several optimizers at once: each parameter is moved by its transform."""

from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

from dynlora_fn import Factors, partition, project_optimizer_state
from dynlora_fn.optim import Transform, Updates, adamw, freeze_counterparts, lion, multi_transform, sgd
from dynlora_fn.testing import Shape, assert_same, low_rank, normal, plan_of
from tests.support.updates import moved, noise


def test_every_parameter_moves_as_with_its_own_transform_alone():
    trainable = partition({"w": low_rank(Shape(5, 6, 3)), "bias": normal(1, 5), "head": normal(2, 4, 5)}).trainable
    transforms = {"w": sgd(), "bias": adamw(), "head": lion()}
    optimizer = multi_transform(transforms, lambda name, leaf: name)
    grads = [tree_map(partial(noise, step), trainable) for step in range(3)]
    got = moved(optimizer, grads, trainable)
    assert list(got) == list(trainable)
    for name, transform in transforms.items():
        alone = moved(transform, [{name: grad[name]} for grad in grads], {name: trainable[name]})
        assert_same(got[name], alone[name])


def test_a_rate_by_name_reaches_the_transform():
    trainable = {"a": normal(0, 3), "b": normal(1, 3)}
    optimizer = multi_transform({"all": sgd(momentum=0.0)}, lambda name, leaf: "all")
    updates, _ = optimizer.update(trainable, optimizer.init(trainable), trainable, lr={"a": 0.5, "b": 0.0})
    assert_same(updates["a"], -0.5 * trainable["a"])
    assert not updates["b"].any()


def test_a_transform_that_is_not_there_is_refused():
    optimizer = multi_transform({"sgd": sgd()}, lambda name, leaf: "adam")
    with pytest.raises(ValueError, match="`choose` returned 'adam' for 'w'; return one of sgd"):
        optimizer.init({"w": Factors(b=normal(0, 3, 1), a=normal(0, 1, 3))})


@pytest.mark.parametrize(("changed", "found"), [({}, r"\[\]"), ({"w": 1, "v": 2}, r"\['v', 'w'\]"), ([1], r"\[1\]")])
def test_a_transform_that_returns_other_updates_is_named(changed: Any, found: str):
    inner = Transform(lambda trainable: None, lambda grads, opt_state, trainable, *, lr: Updates(changed, opt_state))
    trainable = {"w": torch.ones(2)}
    for optimizer, name in (
        (multi_transform({"mine": inner}, lambda name, leaf: "mine"), r"transforms\['mine'\].update"),
        (freeze_counterparts(inner), "inner.update"),
    ):
        with pytest.raises(ValueError, match=rf"`{name}` returns updates for {found}; return one for each of \['w'\]"):
            optimizer.update(trainable, optimizer.init(trainable), trainable, lr=0.1)


def test_labels_may_have_any_names():
    labels = {"state": sgd(), "param_groups": sgd()}
    optimizer = multi_transform(labels, lambda name, leaf: "state" if name == "w" else "param_groups")
    param = low_rank(Shape(6, 4, 2))
    state = optimizer.init({"w": param.factors, "bias": torch.ones(3)})
    new = project_optimizer_state(state, {"w": plan_of(2, b=1, a=1)})
    assert new["state"].frozen_for["w"].b.sum() == 5
