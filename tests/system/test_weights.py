"""What is promised of a weight is true of the weight, over a long run of every transform that changes weights.

A dense shadow gets the same changes of weights, in float64 and from their definitions.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import dynlora_fn as dl
from dynlora_fn.testing import Shape, Storage, exact_weight, low_rank, normal
from dynlora_fn.testing._shadow import half_step

STEPS, MERGE_EVERY, DECAY = 1000, 50, 0.98
SHAPE = Shape(12, 16, 4)


class Dense(NamedTuple):
    """The shadow: the weight and its average."""

    weight: Tensor
    averaged: Tensor


def product(params: dict) -> Tensor:
    b, a = params["w"].factors
    return b.double() @ a.double() / b.shape[-1]


def run(storage: Storage | None, dtype: torch.dtype) -> tuple[dict, dict, Dense]:
    """Train towards a target with decay, switches, merges and an average. The rank changes half way."""
    params = {"w": low_rank(SHAPE, (2,), storage=storage, factor_dtype=dtype)}
    averaged, target = params, normal(7, 2, *SHAPE[:2])
    dense = Dense(exact_weight(params["w"]), exact_weight(params["w"]))
    optimizer, merges = dl.optim.adamw(), dl.schedules.every(MERGE_EVERY)
    switches = dl.schedules.Schedule(interval=10, freeze=2)
    opt_state = optimizer.init(dl.partition(params).trainable)
    for step in range(STEPS):
        rate = 1e-3 * (1 + step % 3)
        grads = dl.optim.project_gradients({"w": exact_weight(params["w"]) - target}, params)
        plan = switches(step, params)
        params, averaged = dl.switch(params, plan).params, dl.switch(averaged, plan).params
        opt_state = dl.project_optimizer_state(opt_state, plan)
        params = dl.decay(params, rate)
        trainable, frozen = dl.partition(params)
        updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=1e-2)
        before, params = product(params), dl.combine(dl.apply_updates(trainable, updates), frozen)
        weight = (1 - rate) * dense.weight + product(params) - before
        averaged = dl.optim.average(averaged, params, decay=DECAY)
        dense = Dense(weight, DECAY * dense.averaged + (1 - DECAY) * weight)
        if merges.switches(step, params):
            plan = merges(step, params)
            incoming = dl.candidates(params, plan, start="lora")
            params = dl.switch(params, plan, incoming=incoming).params
            averaged = dl.switch(averaged, plan, incoming=incoming).params
            opt_state = dl.project_optimizer_state(opt_state, plan, rule="prune")
        if step == STEPS // 2:
            params, opt_state = dl.resize(params, opt_state, rank=6)
            averaged, _ = dl.resize(averaged, rank=6)
    return params, averaged, dense


@pytest.mark.slow
@pytest.mark.parametrize(
    ("storage", "dtype"),
    [
        (None, torch.float64),
        (Storage("int8", "int8"), torch.float32),
        (Storage("int8", "bfloat16"), torch.float32),
    ],
    ids=str,
)
def test_a_thousand_steps_are_those_of_dense_weights(storage: Storage | None, dtype: torch.dtype):
    params, averaged, dense = run(storage, dtype)
    assert params["w"].factors.b.shape[-1] == 6
    start = exact_weight(low_rank(SHAPE, (2,), storage=storage, factor_dtype=dtype))
    assert (dense.weight - start).abs().amax() > 1, "the run must move the weight"
    assert (dense.weight - dense.averaged).abs().amax() > 1e-3, "the average must be another weight"
    for param, wanted in ((params["w"], dense.weight), (averaged["w"], dense.averaged)):
        # One rounding of the base in each step, at most, and one quantization error.
        bound = STEPS * torch.finfo(torch.float64).eps * 10 if storage is None else half_step(param.base)
        assert ((exact_weight(param) - wanted).abs() <= bound).all()
