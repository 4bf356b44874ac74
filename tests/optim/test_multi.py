"""Several optimizers at once: each parameter is moved by its transform."""

from functools import partial

import pytest
from torch.utils._pytree import tree_map

from dynlora_fn import Factors, partition
from dynlora_fn.optim import adamw, lion, multi_transform, sgd
from dynlora_fn.testing import Shape, assert_same, low_rank, normal
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
