"""What is true for every optimizer in the table, besides the rules for its state."""

from contextlib import nullcontext
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dynlora_fn import apply_updates, compile_step, partition, project_optimizer_state, switch
from dynlora_fn.optim import Change
from dynlora_fn.testing import Shape, assert_same, low_rank, normal, plan_of, untouched
from tests.support.optimizer_table import OPTIMIZERS, Entry

LR = 0.01
every_optimizer = pytest.mark.parametrize("entry", OPTIMIZERS.values(), ids=OPTIMIZERS)


def some_params(dtype: torch.dtype = torch.float64, stack: tuple[int, ...] = ()) -> Any:
    return {"w": low_rank(Shape(5, 6, 4), stack, base_dtype=dtype, factor_dtype=dtype), "bias": normal(1, 5).to(dtype)}


def some_trainable(dtype: torch.dtype = torch.float64, stack: tuple[int, ...] = ()) -> Any:
    return partition(some_params(dtype, stack)).trainable


def some_grads(trainable: Any, seed: int) -> Any:
    return tree_map(lambda leaf: normal(seed, *leaf.shape).to(leaf.dtype), dict(trainable))


def state_after(entry: Entry, trainable: Any, steps: int = 3) -> Any:
    state = entry.transform.init(trainable)
    for step in range(steps):
        _, state = entry.transform.update(some_grads(trainable, step), state, trainable, lr=LR)
    return state


@every_optimizer
def test_an_update_changes_no_argument_and_keeps_shapes_and_dtypes(entry: Entry):
    trainable = some_trainable(torch.bfloat16, (2,))
    state, grads, lr = entry.transform.init(trainable), some_grads(trainable, 0), torch.tensor(LR)
    with untouched(trainable, state, grads, lr):
        updates, new_state = entry.transform.update(grads, state, trainable, lr=lr)
    for got, wanted in ((apply_updates(trainable, updates), trainable), (new_state, state)):
        kinds = [tree_map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (got, wanted)]
        assert kinds[0] == kinds[1]
    memory = [leaf.data_ptr() for leaf in tree_leaves(state)]
    assert len(set(memory)) == len(memory)  # no aliases, so that the state can be donated


@every_optimizer
def test_moments_of_bfloat16_parameters_are_float32(entry: Entry):
    state = state_after(entry, some_trainable(torch.bfloat16))
    assert {leaf.dtype for leaf in tree_leaves(state) if leaf.is_floating_point()} == {torch.float32}


@every_optimizer
def test_the_learning_rate_may_be_a_number_a_tensor_or_by_name(entry: Entry):
    trainable = some_trainable()
    state, grads = state_after(entry, trainable), some_grads(trainable, 9)
    by_number = entry.transform.update(grads, state, trainable, lr=LR)
    by_tensor = entry.transform.update(grads, state, trainable, lr=torch.tensor(LR, dtype=torch.float64))
    assert_same(by_tensor, by_number)
    by_name = entry.transform.update(grads, state, trainable, lr={"w": LR, "bias": 0.0})
    assert_same(by_name.updates["w"], by_number.updates["w"])
    assert_same(by_name.opt_state, by_number.opt_state)
    assert by_number.updates["bias"].any()
    assert not by_name.updates["bias"].any()


@every_optimizer
def test_a_stack_moves_as_the_loop_over_its_members(entry: Entry):
    trainable = some_trainable(stack=(2,))
    del trainable["bias"]
    grads = some_grads(trainable, 3)
    stacked, _ = entry.transform.update(grads, entry.transform.init(trainable), trainable, lr=LR)
    for member in range(2):
        alone, grad = (tree_map(lambda leaf: leaf[member], tree) for tree in (trainable, grads))  # noqa: B023
        updates, _ = entry.transform.update(grad, entry.transform.init(alone), alone, lr=LR)
        for got, wanted in zip(stacked["w"], updates["w"], strict=True):
            torch.testing.assert_close(got[member], wanted, rtol=1e-12, atol=1e-12)


@every_optimizer
@pytest.mark.parametrize("frozen_for", [0, 1, 5])
def test_frozen_counterparts_move_again_after_exactly_so_many_updates(entry: Entry, frozen_for: int):
    trainable, plan = some_trainable(), {"w": plan_of(4, b=2, a=1, frozen_for=frozen_for)}
    b_slots, a_slots = plan["w"].a.slots, plan["w"].b.slots  # the counterparts
    state = project_optimizer_state(state_after(entry, trainable), plan)
    for step in range(frozen_for + 2):
        updates, state = entry.transform.update(some_grads(trainable, step), state, trainable, lr=LR)
        b, a = updates["w"].b, updates["w"].a
        assert bool(b[:, b_slots].any()) == bool(a[a_slots].any()) == (step >= frozen_for)
        b, a = (side.clone() for side in (b, a))
        b[:, b_slots], a[a_slots] = 1, 1
        assert b.any(0).all()
        assert a.any(1).all()


@every_optimizer
def test_only_a_first_moment_can_be_transported(entry: Entry):
    params, plan = some_params(), {"w": plan_of(4, b=2, a=1)}
    state, change = state_after(entry, partition(params).trainable), Change(params, switch(params, plan).params)
    refusal = pytest.raises(ValueError, match=r"`opt_state` must have a first moment .* \['w'\]")
    with nullcontext() if entry.has_first_moment else refusal:
        project_optimizer_state(state, plan, rule="transport", change=change)


@every_optimizer
def test_compiled_equals_eager_without_a_recompile_over_learning_rates(entry: Entry):
    trainable = some_trainable()

    def step(state: Any, inputs: tuple[Any, Tensor]) -> tuple[Any, None]:
        trainable, opt_state = state
        updates, opt_state = entry.transform.update(inputs[0], opt_state, trainable, lr=inputs[1])
        return (apply_updates(trainable, updates), opt_state), None

    compiled = compile_step(step, backend="aot_eager", donate=False)
    state = trainable, entry.transform.init(trainable)
    compiled(state, (some_grads(trainable, 0), torch.tensor(LR)))
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in range(3):
            inputs = some_grads(trainable, seed), torch.tensor(LR * (1 + seed))
            wanted, _ = step(state, inputs)
            state, _ = compiled(state, inputs)
            assert_same(state, wanted)


@every_optimizer
def test_neither_autocast_nor_a_default_device_changes_an_update(entry: Entry):
    """Under autocast, products would be rounded to bfloat16."""
    trainable = some_trainable(torch.float32)
    state, grads = state_after(entry, trainable), some_grads(trainable, 9)
    wanted = entry.transform.update(grads, state, trainable, lr=LR)
    for context in (torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta")):
        with context:
            assert_same(entry.transform.update(grads, state, trainable, lr=LR), wanted)


@every_optimizer
@pytest.mark.parametrize(
    "rate", [np.float32(1), np.int64(1), Fraction(1), torch.tensor(1, dtype=torch.uint8)], ids=repr
)
def test_a_rate_may_be_any_real_number(entry: Entry, rate: Any):
    trainable = some_trainable()
    state, grads = entry.transform.init(trainable), some_grads(trainable, 0)
    got, wanted = (entry.transform.update(grads, state, trainable, lr=lr).updates for lr in (rate, 1.0))
    for left, right in zip(tree_leaves(got), tree_leaves(wanted), strict=True):
        torch.testing.assert_close(left, right)
