"""AdamW with a count per vector, what a switch does to any optimizer's state, and clipping."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dynlora_fn import Factors, Plan, SidePlan, apply_updates, partition, project_optimizer_state
from dynlora_fn.optim import adamw, clip_by_global_norm
from dynlora_fn.testing import Shape, assert_same, assert_within, eps, low_rank, normal, untouched

LR = 0.01


def some_trainable(dtype: torch.dtype = torch.float64, stack: tuple[int, ...] = ()) -> dict[str, Factors | Tensor]:
    params = {"w": low_rank(Shape(5, 6, 4), stack, factor_dtype=dtype), "bias": normal(1, 5, dtype=dtype)}
    return partition({**params, "scale": normal(2, dtype=dtype)}).trainable


def some_grads(trainable: Any, step: int) -> Any:
    """Of magnitudes between 0.5 and 1.5, so that an error of a moment is no larger relative to its root."""
    signs = tree_map(lambda leaf: normal(100 + step, *leaf.shape).sign(), trainable)
    return tree_map(
        lambda leaf, sign: (sign * (0.5 + normal(step, *leaf.shape).sin().abs())).to(leaf.dtype), trainable, signs
    )


def one_switch(b: list[int], a: list[int], frozen_for: int, rank: int = 4) -> dict[str, Plan]:
    """Padded with an entry that is not active and names slot 0."""

    def side(slots: list[int]) -> SidePlan:
        active = torch.tensor([True] * len(slots) + [False])
        return SidePlan(torch.tensor([*slots, 0]), torch.arange(len(active)) + rank, active)

    return {"w": Plan(side(b), side(a), torch.tensor(frozen_for, dtype=torch.int32))}


# --- adamw


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "options", [{}, {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}, {"betas": (0.0, 0.9)}]
)
def test_adamw_equals_torch(dtype, options):
    steps, trainable = 100, some_trainable(dtype, stack=(2,))
    leaves = [leaf.clone().requires_grad_() for leaf in tree_leaves(trainable)]
    theirs = torch.optim.AdamW(leaves, **{"weight_decay": 0.0, **options}, foreach=False)
    ours = adamw(**options)
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
    # A moment is off by half an eps for each step before, of numbers up to 1.5 against a root of at least 0.5; the rest
    # of an update of up to 3 * LR is some 10 roundings. The sum with a parameter below 8 rounds once a step.
    bound = steps * ((6 * steps + 10) * 3 * LR + 8) * eps(dtype)
    for got, wanted in zip(tree_leaves(trainable), leaves, strict=True):
        assert got.dtype == dtype
        assert_within(got, wanted.detach(), bound)
    assert all((count == steps).all() for count in tree_leaves(state.count))


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
            first = state.nu
    for nu, start in zip(tree_leaves(state.nu), tree_leaves(first), strict=True):
        assert (nu < start).all()  # in bfloat16, 0.999 of it would be the number itself
        torch.testing.assert_close(nu, start * 0.999**19, rtol=20 * eps(torch.float32), atol=0)


def test_a_constant_gradient_moves_by_the_learning_rate():
    """Both moments, corrected, are the gradient and its square. In float32, 1 - 0.999 alone would be off by 3e-5."""
    trainable, optimizer = some_trainable(torch.float32), adamw(eps=0.0)
    state, grads = optimizer.init(trainable), some_grads(trainable, 0)
    for step in range(100):
        updates, state = optimizer.update(grads, state, trainable, lr=1.0)
        for update, grad in zip(tree_leaves(updates), tree_leaves(grads), strict=True):
            # Half an eps a step for each of the moments, and some 10 roundings.
            assert_within(update, -grad.sign(), (step + 10) * eps(torch.float32))


def test_updates_are_rounded_once():
    """A little more than half of what separates 1 from the next number of bfloat16; alone it would round to half."""
    one, update = {"w": torch.ones(2, dtype=torch.bfloat16)}, {"w": torch.full((2,), 2.0**-8 + 2.0**-17)}
    assert_same(apply_updates(one, update), {"w": torch.full((2,), 1 + 2.0**-7, dtype=torch.bfloat16)})


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
        # The count runs on while a vector stands still.
        assert state.count["w"].b.flatten().tolist() == [3 + step + 1, step + 1] * 2 * max(len(stack) * 2, 1)


def test_freeze_counters_stop_at_zero():
    trainable = some_trainable()
    optimizer = adamw()
    opt_state = project_optimizer_state(optimizer.init(trainable), one_switch(b=[0], a=[1], frozen_for=2))
    for _ in range(4):
        _, opt_state = optimizer.update(some_grads(trainable, 0), opt_state, trainable, lr=LR)
    assert all((leaf == 0).all() for leaf in tree_leaves(opt_state.frozen_for))


def test_a_vector_thaws_gently():
    """0.52 of a full step at the sixth count, 0.89 four later, of a gradient that stays the same."""
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
    trainable, optimizer = some_trainable(), adamw(weight_decay=0.1)
    state = project_optimizer_state(optimizer.init(trainable), one_switch(b=[0], a=[1], frozen_for=5))
    updates, _ = optimizer.update(some_grads(trainable, 0), state, trainable, lr=LR)
    for update, vector in ((updates["w"].b[:, 1], trainable["w"].b[:, 1]), (updates["w"].a[0], trainable["w"].a[0])):
        torch.testing.assert_close(update, -LR * 0.1 * vector, rtol=4 * eps(torch.float64), atol=0)


def test_update_leaves_its_arguments_alone_and_keeps_their_kinds():
    trainable, optimizer = some_trainable(torch.bfloat16, stack=(2,)), adamw(weight_decay=0.1)
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
    trainable, optimizer = some_trainable(), adamw(weight_decay=0.1)
    state, grads = optimizer.init(trainable), some_grads(trainable, 0)
    number = optimizer.update(grads, state, trainable, lr=LR)
    assert_same(optimizer.update(grads, state, trainable, lr=torch.tensor(LR, dtype=torch.float64)), number)
    by_name = optimizer.update(grads, state, trainable, lr={"w": LR, "bias": 2 * LR, "scale": 0.0})
    assert_same(by_name.updates["w"], number.updates["w"])
    assert_same(by_name.updates["bias"], 2 * number.updates["bias"])
    assert not by_name.updates["scale"].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (0.9, 1.0)}, r"`betas` must be in \[0, 1\), got \(0\.9, 1\.0\)"),
        ({"betas": (-0.1, 0.9)}, r"`betas` must be in \[0, 1\)"),
        ({"eps": -1e-8}, "`eps` must be at least 0, got -1e-08"),
        ({"weight_decay": -1}, "`weight_decay` must be at least 0, got -1"),
    ],
)
def test_adamw_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        adamw(**options)


# --- clip_by_global_norm


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_clipping_equals_torch(max_norm, dtype):
    grads = some_grads(some_trainable(dtype, stack=(2,)), 0)
    leaves = [torch.zeros_like(grad).requires_grad_() for grad in tree_leaves(grads)]
    for leaf, grad in zip(leaves, tree_leaves(grads), strict=True):
        leaf.grad = grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(leaves, max_norm)
    got = clip_by_global_norm(grads, max_norm)
    # The norm adds up 94 squares, in any order; a clipped gradient rounds three times more.
    torch.testing.assert_close(got.norm, norm, rtol=94 * eps(dtype), atol=0)
    for grad, leaf in zip(tree_leaves(got.grads), leaves, strict=True):
        torch.testing.assert_close(grad, leaf.grad, rtol=97 * eps(dtype), atol=0)
    if max_norm > norm:
        assert_same(got.grads, grads)


def test_the_norm_of_gradients_in_bfloat16_is_summed_in_float32():
    grads = {"w": torch.full((1000,), 0.1, dtype=torch.bfloat16)}
    got = clip_by_global_norm(grads, 1.0)
    assert got.norm.dtype == torch.float32
    assert got.grads["w"].dtype == torch.bfloat16
    wanted = grads["w"][0].item() * 1000**0.5
    assert got.norm.item() == pytest.approx(wanted, rel=1000 * eps(torch.float32))
    # Gradient, factor and product are each rounded once.
    assert got.grads["w"][0].item() == pytest.approx(1000**-0.5, rel=1.5 * eps(torch.bfloat16))
