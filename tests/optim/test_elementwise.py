"""A formula for lists of tensors has the bits of the formula for each tensor, in batches, in blocks and in turn."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.utils._pytree import tree_leaves, tree_map

import dynlora_fn as dl
from dynlora_fn import Factors
from dynlora_fn.optim import _in_batches
from dynlora_fn.optim._elementwise import elementwise
from dynlora_fn.testing import assert_same, normal
from tests.support.optimizer_table import OPTIMIZERS, Entry

SHAPES = {"w": ((6, 3), (3, 4)), "stack": ((2, 5, 2), (2, 2, 7)), "row": ((1, 1), (1, 4))}


def some_tree(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    tree: dict[str, Any] = {
        name: Factors(normal(seed, *b).to(dtype), normal(seed + 1, *a).to(dtype)) for name, (b, a) in SHAPES.items()
    }
    return tree | {"matrix": normal(seed, 5, 6).to(torch.float64), "transposed": normal(seed, 4, 3).to(dtype).mT}


def two_updates(entry: Entry, trainable: Any, lr: Any) -> Any:
    state, updates = entry.transform.init(trainable), None
    for seed in range(2):
        grads = tree_map(lambda leaf: normal(seed, *leaf.shape).to(leaf.dtype), trainable)  # noqa: B023
        updates, state = entry.transform.update(grads, state, trainable, lr=lr)
        trainable = dl.apply_updates(trainable, updates)
    return trainable, updates, state


@pytest.mark.parametrize("most", [1, 7, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entry", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_updates_in_batches_and_blocks_have_the_bits_of_updates_in_turn(entry, dtype, most, monkeypatch):
    trainable = some_tree(3, dtype)
    by_name = {name: 0.01 * (1 + index % 2) for index, name in enumerate(trainable)}
    for lr in (0.01, torch.tensor(0.01), by_name):
        monkeypatch.setattr(_in_batches, "_MOST_ON_CPU", most)
        got = two_updates(entry, trainable, lr)
        with monkeypatch.context() as context:
            context.setattr(_in_batches, "are_immediate", lambda _: False)
            assert_same(got, two_updates(entry, trainable, lr))


def test_a_rate_of_a_wider_dtype_widens_updates_of_0d_leaves_in_batches_too():
    optimizer, trainable = dl.optim.adamw(), {"u": torch.tensor(1.0), "v": torch.tensor(2.0), "w": torch.ones(3)}
    updates, state = optimizer.update(trainable, optimizer.init(trainable), trainable, lr=torch.tensor(0.1).double())
    assert [leaf.dtype for leaf in updates.values()] == [torch.float64, torch.float64, torch.float32]
    assert all(leaf.dtype == torch.float32 for leaf in state.inner.mu.values())


def test_an_update_in_batches_changes_none_of_its_arguments():
    for entry in OPTIMIZERS.values():
        trainable = some_tree(5)
        state = entry.transform.init(trainable)
        before = tree_map(torch.clone, (trainable, state))
        entry.transform.update(trainable, state, trainable, lr=0.1)
        assert_same((trainable, state), before)


def test_an_empty_tree_has_empty_results():
    two = elementwise(results=2)(lambda x, y: (x + y, x))
    assert two({}, {}) == ({}, {})


def test_gradients_by_a_learning_rate_and_by_one_of_many_leaves_are_kept():
    optimizer, trainable = dl.optim.sgd(momentum=0.0), {"u": torch.ones(3), "v": torch.ones(2)}
    grads = {"u": torch.tensor([1.0, 2.0, 3.0]), "v": torch.ones(2)}

    def moved(lr: Tensor, v: Tensor) -> Tensor:
        updates, _ = optimizer.update({**grads, "v": v}, optimizer.init(trainable), trainable, lr=lr)
        return sum((leaf.sum() for leaf in tree_leaves(updates)), torch.zeros(()))

    lr, v = torch.tensor(0.5, requires_grad=True), grads["v"].clone().requires_grad_()
    by_lr, by_v = torch.autograd.grad(moved(lr, v), (lr, v))
    assert by_lr == -8
    assert torch.equal(by_v, torch.full((2,), -0.5))
    assert grad(moved)(torch.tensor(0.5), grads["v"]) == -8
    mapped = vmap(moved, in_dims=(0, None))(torch.tensor([0.5, 1.0]), grads["v"])
    assert torch.equal(mapped, torch.tensor([-4.0, -8.0]))
