"""Frozen vectors do not move, and then they do."""

from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from dynlora_fn import project_optimizer_state
from dynlora_fn._core._types import ShardedFactors, Sharding
from dynlora_fn.optim import Transform, Updates, adamw, freeze_counterparts, lion, sgd
from dynlora_fn.testing import assert_same, eps, untouched
from tests.support.optimizer_table import OPTIMIZERS
from tests.support.optimizers import LR, one_switch, some_grads, some_trainable


@pytest.mark.parametrize("stack", [(), (2,)])
@pytest.mark.parametrize("frozen_for", [0, 1, 5])
def test_counterparts_stand_still_for_exactly_so_many_updates(stack, frozen_for):
    trainable, optimizer = some_trainable(stack=stack), adamw()
    state = optimizer.init(trainable)
    for step in range(3):
        updates, state = optimizer.update(some_grads(trainable, step), state, trainable, lr=LR)
    state = project_optimizer_state(state, one_switch(b=[2], a=[1, 3], frozen_for=frozen_for))
    for step in range(frozen_for + 2):
        updates, state = optimizer.update(some_grads(trainable, step), state, trainable, lr=LR)
        moves_b = [(updates["w"].b[..., :, k] != 0).all().item() for k in range(4)]
        moves_a = [(updates["w"].a[..., k, :] != 0).all().item() for k in range(4)]
        thawed = step >= frozen_for
        assert moves_b == [True, thawed, True, thawed]
        assert moves_a == [True, True, thawed, True]
        if not thawed:
            assert not updates["w"].b[..., :, [1, 3]].any()
            assert not updates["w"].a[..., 2, :].any()
        left = max(frozen_for - step - 1, 0)
        assert state.frozen_for["w"].a.flatten().tolist() == [0, 0, left, 0] * max(len(stack) * 2, 1)
        # The count increases while a vector is frozen.
        assert state.inner.count["w"].b.flatten().tolist() == [3 + step + 1, step + 1] * 2 * max(len(stack) * 2, 1)


def test_freeze_counters_stop_at_zero():
    trainable = some_trainable()
    optimizer = adamw()
    opt_state = project_optimizer_state(optimizer.init(trainable), one_switch(b=[0], a=[1], frozen_for=2))
    for _ in range(4):
        _, opt_state = optimizer.update(some_grads(trainable, 0), opt_state, trainable, lr=LR)
    assert all((leaf == 0).all() for leaf in tree_leaves(opt_state.frozen_for))


def test_a_vector_thaws_gently():
    """With a constant gradient, the sixth count takes 0.52 of a full step, and the tenth 0.89."""
    trainable, optimizer = some_trainable(), adamw(eps=0.0)
    state = project_optimizer_state(optimizer.init(trainable), one_switch(b=[], a=[1], frozen_for=5))
    grads = some_grads(trainable, 0)
    sizes = []
    for _ in range(10):
        updates, state = optimizer.update(grads, state, trainable, lr=1.0)
        sizes.append(updates["w"].b[:, 1].abs())
    wanted = 0.1 / (1 - 0.9**6) / (0.001 / (1 - 0.999**6)) ** 0.5
    torch.testing.assert_close(
        sizes[5], torch.full((5,), wanted, dtype=torch.float64), rtol=1000 * eps(torch.float64), atol=0
    )
    assert wanted == pytest.approx(0.52, abs=0.005)
    assert sizes[9][0].item() == pytest.approx(0.89, abs=0.005)


def test_frozen_vectors_are_still_decayed():
    trainable, optimizer = some_trainable(), adamw(factor_decay=0.1)
    state = project_optimizer_state(optimizer.init(trainable), one_switch(b=[0], a=[1], frozen_for=5))
    updates, _ = optimizer.update(some_grads(trainable, 0), state, trainable, lr=LR)
    for update, vector in ((updates["w"].b[:, 1], trainable["w"].b[:, 1]), (updates["w"].a[0], trainable["w"].a[0])):
        torch.testing.assert_close(update, -LR * 0.1 * vector, rtol=4 * eps(torch.float64), atol=0)


class Mean(NamedTuple):
    """The state of a mean of gradients, of a user's own type."""

    mean: Any
    roles = {"mean": "first_moment"}  # noqa: RUF012, an annotation would make it a field


def mean_of_gradients(inner: Transform) -> Transform:
    """Wrap a transform so that it gets a mean of the gradients. Its state is a pair."""

    def init(trainable: Any) -> Any:
        return Mean(tree_map(torch.zeros_like, trainable)), inner.init(trainable)

    def update(grads: Any, opt_state: Any, trainable: Any, *, lr: float) -> Updates:
        mean = tree_map(lambda old, grad: 0.5 * old + 0.5 * grad, opt_state[0].mean, grads)
        updates, inner_state = inner.update(mean, opt_state[1], trainable, lr=lr)
        return Updates(updates, (Mean(mean), inner_state))

    return Transform(init, update)


def decayed(inner: Transform) -> Transform:
    """Wrap a transform so that it also shrinks the parameters. Its state has the key of a field of AdamW's."""

    def init(trainable: Any) -> Any:
        return {"mu": inner.init(trainable), "steps": 0}

    def update(grads: Any, opt_state: Any, trainable: Any, *, lr: float) -> Updates:
        updates, inner_state = inner.update(grads, opt_state["mu"], trainable, lr=lr)
        updates = tree_map(lambda step, leaf: step - lr * 0.1 * leaf, updates, trainable)
        return Updates(updates, {"mu": inner_state, "steps": opt_state["steps"] + 1})

    return Transform(init, update)


WRAPPERS = {
    "mean": mean_of_gradients(sgd()),
    "decay": decayed(lion()),
    "chain": mean_of_gradients(decayed(adamw())),
    "wrapped twice": freeze_counterparts(decayed(OPTIMIZERS["muon"].transform)),
}


@pytest.mark.parametrize("frozen_for", [0, 1, 4])
@pytest.mark.parametrize("inner", WRAPPERS.values(), ids=WRAPPERS)
def test_a_transform_of_a_user_does_not_move_frozen_vectors(inner, frozen_for):
    trainable, optimizer = some_trainable(), freeze_counterparts(inner)
    opt_state = optimizer.init(trainable)
    for seed in range(3):
        _, opt_state = optimizer.update(some_grads(trainable, seed), opt_state, trainable, lr=LR)
    opt_state = project_optimizer_state(opt_state, one_switch(b=[2], a=[1, 3], frozen_for=frozen_for))
    for step in range(frozen_for + 2):
        with untouched(trainable, opt_state):
            updates, opt_state = optimizer.update(some_grads(trainable, step), opt_state, trainable, lr=LR)
        thawed = step >= frozen_for
        assert updates["w"].b.any(0).tolist() == [True, thawed, True, thawed]
        assert updates["w"].a.any(1).tolist() == [True, True, thawed, True]
        assert updates["bias"].all()


@pytest.mark.parametrize("inner", WRAPPERS.values(), ids=WRAPPERS)
def test_without_a_switch_a_wrapped_transform_is_the_transform(inner):
    trainable, optimizer = some_trainable(), freeze_counterparts(inner)
    wrapped, plain = optimizer.init(trainable), inner.init(trainable)
    for seed in range(3):
        got, wrapped = optimizer.update(some_grads(trainable, seed), wrapped, trainable, lr=LR)
        wanted, plain = inner.update(some_grads(trainable, seed), plain, trainable, lr=LR)
        assert_same(got, wanted)
        assert_same(wrapped.inner, plain)


def test_counts_of_sharded_factors_are_those_of_whole_ones():
    """A process may have no row or no column."""
    factors = some_trainable()["w"]
    sharding = Sharding(group="0", world_size=2, process=1, rows=5, columns=6)
    sharded = {"w": ShardedFactors(factors.b[:0], factors.a[:, :0], sharding)}
    whole, optimizer = freeze_counterparts(sgd()).init({"w": factors}), freeze_counterparts(sgd())
    opt_state = optimizer.init(sharded)
    assert_same(opt_state.frozen_for, whole.frozen_for)
    for transform in (sgd(), lion(), adamw(), adamw(factor_decay=0.1)):
        state = project_optimizer_state(transform.init(sharded), one_switch(b=[0], a=[1], frozen_for=2))
        updates, new = transform.update(sharded, state, sharded, lr=LR)
        assert isinstance(updates["w"], ShardedFactors)
        assert new.frozen_for["w"].b.flatten().tolist() == [0, 1, 0, 0]
        assert new.inner.mu["w"].sharding == sharding
