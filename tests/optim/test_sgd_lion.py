"""SGD and Lion are those of torch and of the paper, and respect frozen vectors."""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from dynlora_fn import apply_updates, partition, project_optimizer_state
from dynlora_fn.optim import adamw, lion, muon, normalized_sgd, sgd
from dynlora_fn.testing import normal
from tests.support.optimizer_states import SWITCH, updated_state, weights
from tests.support.optimizer_table import OPTIMIZERS as ENTRIES
from tests.support.optimizers import one_switch


@pytest.mark.parametrize(
    ("transform", "kind", "settings"),
    [
        (sgd(momentum=0.9), torch.optim.SGD, {"momentum": 0.9}),
        (sgd(momentum=0.0), torch.optim.SGD, {}),
        (sgd(weight_decay=0.1), torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    ],
)
def test_sgd_is_torch_s(transform, kind, settings):
    trainable = partition(weights()).trainable
    if settings.get("weight_decay"):  # which is refused for factors
        trainable = {"bias": trainable["bias"], "matrix": normal(2, 4, 3)}
    leaves = [leaf.clone().requires_grad_() for leaf in tree_leaves(trainable)]
    optimizer, state = kind(leaves, lr=0.1, **settings), transform.init(trainable)
    for seed in range(4):
        grads = tree_map(lambda leaf: normal(seed, *leaf.shape), dict(trainable))  # noqa: B023, called at once
        for leaf, grad in zip(leaves, tree_leaves(grads), strict=True):
            leaf.grad = grad
        optimizer.step()
        updates, state = transform.update(grads, state, trainable, lr=0.1)
        trainable = apply_updates(trainable, updates)
        torch.testing.assert_close(tree_leaves(trainable), [leaf.detach() for leaf in leaves], rtol=1e-13, atol=1e-13)


def test_lion_is_its_paper_s():
    """The values are algorithm 2 of arXiv:2302.06675, computed by hand."""
    transform, param = lion(betas=(0.5, 0.75), weight_decay=0.5), {"w": torch.tensor([1.0, 2.0])}
    state = transform.init(param)
    updates, state = transform.update({"w": torch.tensor([4.0, -8.0])}, state, param, lr=0.1)
    torch.testing.assert_close(updates["w"], torch.tensor([-0.15, 0.0]))  # -(1 + 0.5) / 10, -(-1 + 1) / 10
    torch.testing.assert_close(state.inner.mu["w"], torch.tensor([1.0, -2.0]))
    updates, state = transform.update({"w": torch.tensor([-0.5, 3.0])}, state, param, lr=0.1)
    torch.testing.assert_close(updates["w"], torch.tensor([-0.15, -0.2]))  # signs of 0.25 and 0.5
    torch.testing.assert_close(state.inner.mu["w"], torch.tensor([0.625, -0.75]))


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_a_frozen_vector_stands_still_for_exactly_so_long(entry):
    transform, trainable = entry.transform, partition(weights()).trainable
    state = project_optimizer_state(updated_state(transform)(trainable), one_switch(**SWITCH))
    for step in range(7):
        updates, state = transform.update(tree_map(torch.ones_like, dict(trainable)), state, trainable, lr=1.0)
        assert bool(updates["w"].b[:, 2].any()) == (step >= 5)
        assert updates["w"].b[:, 1].any()


@pytest.mark.parametrize("optimizer", [sgd(), lion(), adamw()], ids=["sgd", "lion", "adamw"])
def test_an_infinite_parameter_stays_without_a_gradient(optimizer):
    """A decay of zero is no product with zero."""
    trainable, grads = {"mask": torch.tensor([1.0, -torch.inf])}, {"mask": torch.tensor([0.5, 0.0])}
    updates, _ = optimizer.update(grads, optimizer.init(trainable), trainable, lr=0.1)
    assert torch.isfinite(updates["mask"]).all()


@pytest.mark.parametrize(
    "optimizer",
    [sgd(), sgd(weight_decay=0.1), lion(), adamw(), muon(), normalized_sgd()],
    ids=["sgd", "sgd, decay", "lion", "adamw", "muon", "normalized_sgd"],
)
def test_a_sparse_gradient_moves_as_the_dense_one(optimizer):
    trainable = {"table": normal(0, 5, 3), "head": normal(1, 5, 3)}
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 2, 2]]), normal(2, 3, 3), (5, 3), check_invariants=True)
    state = optimizer.init(trainable)
    got = optimizer.update({"table": sparse, "head": normal(3, 5, 3)}, state, trainable, lr=0.1)
    wanted = optimizer.update({"table": sparse.to_dense(), "head": normal(3, 5, 3)}, state, trainable, lr=0.1)
    for left, right in zip(tree_leaves(got), tree_leaves(wanted), strict=True):
        torch.testing.assert_close(left, right)
