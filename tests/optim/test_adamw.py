"""AdamW with a count for each vector."""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from dynlora_fn import apply_updates
from dynlora_fn.optim import adamw, clip_by_global_norm
from dynlora_fn.testing import assert_same, assert_within, eps, untouched
from tests.support.optimizer_states import trees_of
from tests.support.optimizers import LR, decaying_adamw, some_grads, some_trainable


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "options", [{}, {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}, {"betas": (0.0, 0.9)}]
)
def test_adamw_equals_torch(dtype, options):
    steps, trainable = 100, some_trainable(dtype, stack=(2,))
    leaves = [leaf.clone().requires_grad_() for leaf in tree_leaves(trainable)]
    theirs = torch.optim.AdamW(leaves, **{"weight_decay": 0.0, **options}, foreach=False)
    decay = options.get("weight_decay", 0.0)
    ours = decaying_adamw(decay, **{name: value for name, value in options.items() if name != "weight_decay"})
    state = ours.init(trainable)
    for step in range(steps):
        lr = LR * (1 + step % 3)
        grads = some_grads(trainable, step)
        for leaf, grad in zip(leaves, tree_leaves(grads), strict=True):
            leaf.grad = grad
        theirs.param_groups[0]["lr"] = lr
        theirs.step()
        updates, state = ours.update(grads, state, trainable, lr=torch.tensor(lr, dtype=torch.float64))
        trainable = apply_updates(trainable, updates)
    # A moment is off by half an eps for each step before, of numbers up to 1.5 against a root of at least 0.5; the
    # other errors of an update of up to 3 * LR are some 10 roundings. The sum with a parameter below 8 rounds once a
    # step.
    bound = steps * ((6 * steps + 10) * 3 * LR + 8) * eps(dtype)
    for got, wanted in zip(tree_leaves(trainable), leaves, strict=True):
        assert got.dtype == dtype
        assert_within(got, wanted.detach(), bound)
    assert all((count == steps).all() for count in tree_leaves(trees_of(state)["count"]))


def test_parameters_in_bfloat16_have_moments_in_float32():
    trainable = some_trainable(torch.bfloat16)
    wide = tree_map(lambda leaf: leaf.float(), trainable)
    optimizer = adamw()
    state, wide_state = optimizer.init(trainable), optimizer.init(wide)
    for step in range(20):
        grads = tree_map(torch.zeros_like, trainable) if step else some_grads(trainable, 0)
        updates, state = optimizer.update(grads, state, trainable, lr=LR)
        wide_grads = tree_map(lambda grad: grad.float(), grads)
        wide_updates, wide_state = optimizer.update(wide_grads, wide_state, wide, lr=LR)
        assert_same((updates, state), (wide_updates, wide_state))
        if step == 0:
            first = state.inner.nu
    for nu, start in zip(tree_leaves(state.inner.nu), tree_leaves(first), strict=True):
        assert (nu < start).all()  # in bfloat16, 0.999 of it would be the number itself
        torch.testing.assert_close(nu, start * 0.999**19, rtol=20 * eps(torch.float32), atol=0)


def test_a_constant_gradient_moves_by_the_learning_rate():
    """Both moments, corrected, are the gradient and its square. In float32, 1 - 0.999 is already off by 3e-5."""
    trainable, optimizer = some_trainable(torch.float32), adamw(eps=0.0)
    state, grads = optimizer.init(trainable), some_grads(trainable, 0)
    for step in range(100):
        updates, state = optimizer.update(grads, state, trainable, lr=1.0)
        for update, grad in zip(tree_leaves(updates), tree_leaves(grads), strict=True):
            # Half an eps a step for each of the moments, and some 10 roundings.
            assert_within(update, -grad.sign(), (step + 10) * eps(torch.float32))


def test_updates_are_rounded_once():
    """The update is slightly more than half of bfloat16's spacing at 1. Rounded first, it would be exactly half."""
    ones, update = {"w": torch.ones(2, dtype=torch.bfloat16)}, {"w": torch.full((2,), 2.0**-8 + 2.0**-17)}
    assert_same(apply_updates(ones, update), {"w": torch.full((2,), 1 + 2.0**-7, dtype=torch.bfloat16)})


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_updates_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"`updates` has 'w' of shape \(.*\) for a parameter of shape \(3,\)"):
        apply_updates({"w": torch.ones(3)}, {"w": torch.ones(shape)})


def test_update_leaves_its_arguments_alone_and_keeps_their_kinds():
    trainable, optimizer = some_trainable(torch.bfloat16, stack=(2,)), adamw(factor_decay=0.1)
    state, grads, lr = optimizer.init(trainable), some_grads(trainable, 0), torch.tensor(LR)
    with untouched(trainable, state, grads, lr):
        updates, new_state = optimizer.update(grads, state, trainable, lr=lr)
        new = apply_updates(trainable, updates)
        clip_by_global_norm(grads, 0.1)
    for got, wanted in ((new, trainable), (new_state, state)):
        kinds = [tree_map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (got, wanted)]
        assert kinds[0] == kinds[1]
    memory = [leaf.data_ptr() for leaf in tree_leaves(state)]
    assert len(set(memory)) == len(memory)  # nothing aliases, so that it can be donated


def test_the_learning_rate_may_be_a_number_a_tensor_or_one_by_name():
    trainable, optimizer = some_trainable(), adamw(factor_decay=0.1)
    state, grads = optimizer.init(trainable), some_grads(trainable, 0)
    by_number = optimizer.update(grads, state, trainable, lr=LR)
    assert_same(optimizer.update(grads, state, trainable, lr=torch.tensor(LR, dtype=torch.float64)), by_number)
    by_name = optimizer.update(grads, state, trainable, lr={"w": LR, "bias": 2 * LR, "scale": 0.0})
    assert_same(by_name.updates["w"], by_number.updates["w"])
    assert_same(by_name.updates["bias"], 2 * by_number.updates["bias"])
    assert not by_name.updates["scale"].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (0.9, 1.0)}, r"`betas` is 1\.0; use a number in \[0, 1\)"),
        ({"betas": (-0.1, 0.9)}, r"`betas` is -0\.1; use a number in \[0, 1\)"),
        ({"eps": -1e-8}, "`eps` is -1e-08; use a number of at least 0"),
        ({"weight_decay": -1}, "`weight_decay` is -1; use a number of at least 0"),
        ({"factor_decay": -1}, "`factor_decay` is -1; use a number of at least 0"),
    ],
)
def test_adamw_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        adamw(**options)
