"""Frozen vectors do not move, and then they do."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from dynlora_fn import project_optimizer_state
from dynlora_fn.optim import adamw
from dynlora_fn.testing import eps
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
