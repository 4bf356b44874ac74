"""Tensor parallelism of the models here: the step of one process, in parts."""

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import implicit_replication
from torch.utils._pytree import tree_leaves

import dynlora_fn as dl
from dynlora_fn.testing import assert_within, eps
from models import llama, mlp, parallel
from models.pretrain.method import next_token_loss
from tests.support.processes import in_processes

SCHEDULE = dl.schedules.switchlora(40, interval=10, ratio=1.0)


class Job(NamedTuple):
    model: nn.Module
    params: dict[str, Any]

    def batch(self, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        if isinstance(self.model, mlp.MLP):
            return torch.randn(16, self.model.layers[0].in_features, generator=generator)
        return torch.randint(31, (4, 17), generator=generator)

    def loss(self, trainable: Any, frozen: Any, batch: torch.Tensor) -> torch.Tensor:
        params = dl.combine(trainable, frozen)
        if isinstance(self.model, mlp.MLP):
            return (dl.call(self.model, params, batch) - 1).square().mean()
        return next_token_loss(self.model, params, batch)


def job(widths: tuple[int, ...] = (), layers: int = 2) -> Job:
    """Return a job with a perceptron, or without widths with a llama of `layers` layers."""
    torch.manual_seed(0)
    if widths:
        model, targets = mlp.MLP(widths), mlp.TARGETS
    else:
        config = replace(llama.config("llama-tiny", 31), layers=layers)
        model, targets = llama.init_weights(llama.Llama(config), 0), llama.TARGETS
    return Job(model, dl.init(model, rank=4, seed=0, targets=targets))


def step_of(task: Job, mesh=None):
    optimizer = dl.optim.adamw()

    def step(state, batch, lr, plan):
        trainable, frozen, opt_state = state
        if mesh is None:
            loss, grads = dl.value_and_grad(task.loss)(trainable, frozen, batch)
            params, _ = dl.switch(dl.combine(trainable, frozen), plan)
        else:
            given = parallel.to_dtensors(trainable, mesh), parallel.to_dtensors(frozen, mesh)
            loss, grads = parallel.value_and_grad(task.loss, mesh)(*given, batch)
            params = parallel.switch(dl.combine(trainable, frozen), plan, mesh)
        opt_state = dl.project_optimizer_state(opt_state, plan)
        trainable, frozen = dl.partition(params)
        updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=lr)
        return (dl.apply_updates(trainable, updates), frozen, opt_state), loss

    return step


def train(task: Job, params, step, full_shapes, steps: int = 6):
    trainable, frozen = dl.partition(params)
    state, losses = (trainable, frozen, dl.optim.adamw().init(trainable)), []
    for index in range(steps):
        plan = SCHEDULE(index, full_shapes(dl.combine(*state[:2])))
        state, loss = step(state, task.batch(index), torch.tensor(1e-2), plan)
        losses.append(loss.item())
    return dl.combine(*state[:2]), losses


def _train(widths, base, backend) -> None:
    mesh, task = init_device_mesh("cpu", (2,)), job(widths, layers=1)
    parts = parallel.shard(task.params, mesh)
    low_rank = [name for name, param in task.params.items() if isinstance(param, dl.LowRank)]
    for name in low_rank:
        assert 2 * parts[name].base.numel() == task.params[name].base.numel()
    unsharded = task.params
    if base:  # rounded elementwise, so that parts equal those of the unsharded base
        parts, unsharded = (dl.bases.quantize(params, base) for params in (parts, unsharded))
    expected, wanted = train(task, unsharded, step_of(task), dict)
    step = step_of(task, mesh)
    if backend:
        step = dl.compile_step(step, backend=backend)
    with implicit_replication():
        parts, losses = train(task, parts, step, lambda parts: parallel.full_shapes(parts, mesh))
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=0)
    got, wanted = parallel.gather(parts, mesh), parallel.in_full_precision(expected)
    assert len(low_rank) == (7 if not widths else len(task.model.layers) - (widths[0] == widths[1]))
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=2e-5)
    dl.parallel.check_replicas(tree_leaves(got), mesh)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("widths", "base", "backend"),
    [
        ((), None, "aot_eager"),
        ((6, 16, 16, 8), None, None),  # rows, columns and rows
        ((8, 8, 8, 12), "bfloat16", None),  # two in a stack
    ],
)
def test_a_step_in_parts_is_that_of_the_whole(widths, base, backend):
    in_processes(2, _train, widths, base, backend)


def _codes(base: str) -> None:
    """Each part has its scales, so the gathered base has more of them than an unsharded base."""
    mesh, task = init_device_mesh("cpu", (2,)), job()
    parts = dl.bases.quantize(parallel.shard(task.params, mesh), base)
    codes = {
        name: part._replace(base=part.base._replace(residual=())) if isinstance(part, dl.LowRank) else part
        for name, part in parts.items()
    }
    gathered = parallel.gather(codes, mesh)  # as products use it, gathered
    wanted = dl.value_and_grad(task.loss)(*dl.partition(gathered), task.batch(0))
    trainable, frozen = (parallel.to_dtensors(tree, mesh) for tree in dl.partition(parts))
    with implicit_replication():
        loss, grads = parallel.value_and_grad(task.loss, mesh)(trainable, frozen, task.batch(0))
    torch.testing.assert_close(loss, wanted.value)
    for name, leaf in parallel.to_dtensors(grads, mesh).items():
        for got, want in zip(tree_leaves(leaf), tree_leaves(wanted.grads[name]), strict=True):
            torch.testing.assert_close(got.full_tensor(), want, rtol=1e-3, atol=1e-6)
    plan = dl.schedules.every(1)(1, task.params)
    before = dl.materialize(parallel.gather(parts, mesh))
    switched = parallel.switch(parts, plan, mesh)
    after = dl.materialize(parallel.gather(switched, mesh))
    for name in plan:
        assert not torch.equal(switched[name].factors.a, parts[name].factors.a)
        # A residual of at most a sixteenth, float8's half a step, is rounded to eight bits, before and after.
        largest = torch.maximum(before[name].abs().max(), after[name].abs().max())
        assert_within(after[name], before[name], largest / 16 * eps(torch.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("base", ["int8", "float8"])
def test_parts_in_low_precision_have_scales_of_their_own(base):
    in_processes(2, _codes, base)


def _refusals() -> None:
    mesh = init_device_mesh("cpu", (2,))
    with pytest.raises(ValueError, match=r"must divide into 2 shards, got 'layers.2.weight' of shape \(5, 16\)"):
        parallel.shard(job((6, 16, 16, 5)).params, mesh)
    task = job((8, 64, 64))
    with pytest.raises(ValueError, match=r"full precision, got Quantized for .*; shard first, then quantize"):
        parallel.shard(dl.bases.quantize(task.params, "int8"), mesh)
    parts = dl.bases.quantize(parallel.shard(task.params, mesh), "nf4", residual=None)
    with pytest.raises(
        ValueError, match=r"codes with a scale per row or block of a row, got NF4Codes for 'layers.0.weight'"
    ):
        parallel.to_dtensors(parts, mesh)


def test_what_cannot_be_split_is_refused():
    in_processes(2, _refusals)
