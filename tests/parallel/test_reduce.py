"""Several processes: gradients are reduced once, and a switch sends no message."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._pytree import tree_leaves

import dynlora_fn as dl
from tests.support.data_parallel import fresh, model
from tests.support.processes import in_processes
from tests.support.traffic import Traffic

SCHEDULE = dl.schedules.switchlora(200, interval=10, ratio=1.0)


def make_step(net: nn.Module, group=None, share=None):
    optimizer = dl.optim.adamw()

    def step(state, tokens, lr, plan):
        trainable, frozen, opt_state = state

        def loss_fn(trainable):
            logits = dl.call(net, dl.combine(trainable, frozen), tokens[:, :-1])
            return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

        result = tuple(dl.value_and_grad(loss_fn)(trainable))
        loss, grads = result if group is None else dl.parallel.all_reduce_mean(result, group, weight=share)
        params, _ = dl.switch(dl.combine(trainable, frozen), plan)
        opt_state = dl.project_optimizer_state(opt_state, plan)
        trainable, frozen = dl.partition(params)
        updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=lr)
        return (dl.apply_updates(trainable, updates), frozen, opt_state), loss

    return step


def start(params: dict) -> tuple:
    trainable, frozen = dl.partition(params)
    return trainable, frozen, dl.optim.adamw().init(trainable)


def batch(step: int) -> torch.Tensor:
    return torch.randint(11, (12, 7), generator=torch.Generator().manual_seed(step))


def train(state, step, steps, rows=slice(None)):
    losses, lr, switched = [], torch.tensor(1e-2), 0
    for index in range(steps):
        params = dl.combine(*state[:2])
        switched += SCHEDULE.switches(index, params)
        state, loss = step(state, batch(index)[rows], lr, SCHEDULE(index, params))
        losses.append(loss.item())
    return state, losses, switched


def bits(tree) -> list[bytes]:
    return [leaf.contiguous().flatten().view(torch.uint8).numpy().tobytes() for leaf in tree_leaves(tree)]


def _reduce_trees() -> dict:
    process, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    tree = {
        "x": torch.arange(6.0).reshape(2, 3) * (process + 1),
        "y": (torch.ones(3, dtype=torch.float64) * process, torch.tensor(float(process))),
        "empty": torch.zeros(0, 2),
        "half": torch.full((2, 1), process + 1.0, dtype=torch.bfloat16),
    }
    before = copy.deepcopy(tree)
    with Traffic() as traffic:
        mean = dl.parallel.all_reduce_mean(tree, group)
    by_mesh = dl.parallel.all_reduce_mean(tree, mesh)
    shared = dl.parallel.all_reduce_mean(tree, group, weight=[0.25, 0.75][process])
    compiled = torch.compile(
        lambda tree: dl.parallel.all_reduce_mean(tree, group), fullgraph=True, backend="aot_eager"
    )(tree)
    assert bits(tree) == bits(before)
    assert bits(mean) == bits(by_mesh) == bits(compiled)
    return {"mean": mean, "shared": shared, "calls": traffic.calls}


def test_a_mean_takes_one_reduction_for_each_dtype():
    first, second = in_processes(2, _reduce_trees)
    assert bits(first["mean"]) == bits(second["mean"])
    assert first["calls"] == {"all_reduce": 3}
    x = torch.arange(6.0).reshape(2, 3)
    expected = {
        "x": 1.5 * x,
        "y": (torch.full((3,), 0.5, dtype=torch.float64), torch.tensor(0.5)),
        "empty": torch.zeros(0, 2),
        "half": torch.full((2, 1), 1.5, dtype=torch.bfloat16),
    }
    torch.testing.assert_close(first["mean"], expected, rtol=0, atol=0)
    torch.testing.assert_close(second["shared"]["x"], 1.75 * x, rtol=0, atol=0)
    torch.testing.assert_close(second["shared"]["y"][1], torch.tensor(0.75), rtol=0, atol=0)


def _train_in_parallel(steps: int) -> dict:
    process, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    group = torch.distributed.group.WORLD
    rows = range(12)[process * 12 // world_size : (process + 1) * 12 // world_size]
    net = model()
    step = make_step(net, group, share=len(rows) / 12)
    state = start(fresh(net))
    with Traffic() as traffic:
        state, losses, switched = train(state, step, steps, slice(rows.start, rows.stop))
    dl.parallel.check_replicas(state, group)
    return {
        "state": bits(state),
        "losses": losses,
        "calls": traffic.calls,
        "bytes": traffic.bytes,
        "switched": switched,
        "wire": dl.parallel.wire_bytes(state[0]),
    }


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4, 5])  # five divide no batch of twelve
def test_losses_are_those_of_one_process_and_switching_sends_nothing(size: int):
    steps = 200 if size == 4 else 40
    net = model()
    _, alone, switched = train(start(fresh(net)), make_step(net), steps)
    found = in_processes(size, _train_in_parallel, steps)
    assert switched >= (200 if size == 4 else 60)
    for result in found:
        assert result["state"] == found[0]["state"]
        assert result["losses"] == found[0]["losses"]
        assert result["switched"] == switched
        # One message a step, the loss in it: a switch has none.
        assert result["calls"] == {"all_reduce": steps}
        assert result["bytes"] == {"all_reduce": steps * (result["wire"].reduced + 4)}
    torch.testing.assert_close(torch.tensor(found[0]["losses"]), torch.tensor(alone), rtol=1e-4, atol=0)


def _compiled_steps() -> tuple:
    process, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    net, rows = model(), slice(6 * process, 6 * process + 6)
    params = dl.init(net, rank=4, seed=0, targets=["1.0.weight", "2.0.weight"], base="int8")
    eager, losses, _ = train(start(params), make_step(net, group), 4, rows)
    step = dl.compile_step(make_step(net, group), backend="aot_eager")
    state, compiled_losses, _ = train(start(dl.parallel.shard(params, group)), step, 4, rows)
    return (losses, compiled_losses), (eager[0], state[0])


@pytest.mark.slow
def test_reduction_and_gathering_go_into_a_compiled_step():
    for losses, trainables in in_processes(2, _compiled_steps):
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(*trainables, rtol=1e-3, atol=1e-5)
