"""A step on sharded factors equals the step on unsharded ones, and so do the bytes that it stores and sends."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import dynlora_fn as dl
from tests.support.processes import in_processes
from tests.support.traffic import Traffic

SCHEDULE = dl.schedules.switchlora(40, interval=10, ratio=1.0)


def net() -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(18, 18), nn.GELU()) for _ in range(2)]
    return nn.Sequential(nn.Embedding(11, 18), *blocks, nn.Linear(18, 11))


NET = net()
TARGETS = ["*.weight"]


def fresh(base=None) -> dict:
    return dl.init(NET, rank=4, seed=0, targets=TARGETS, base=base)


def bytes_of(tree) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree))


def start(params: dict) -> tuple:
    trainable, frozen = dl.partition(params)
    return trainable, frozen, dl.optim.adamw().init(trainable)


def make_step(group, share):
    optimizer = dl.optim.adamw()

    def step(state, tokens, lr, plan):
        trainable, frozen, opt_state = state

        def loss_fn(trainable):
            logits = dl.call(NET, dl.combine(trainable, frozen), tokens[:, :-1])
            return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

        loss, grads = dl.parallel.all_reduce_mean(tuple(dl.value_and_grad(loss_fn)(trainable)), group, weight=share)
        grads, norm = dl.optim.clip_by_global_norm(grads, 0.5)
        params, _ = dl.switch(dl.combine(trainable, frozen), plan)
        opt_state = dl.project_optimizer_state(opt_state, plan)
        trainable, frozen = dl.partition(params)
        updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=lr)
        return (dl.apply_updates(trainable, updates), frozen, opt_state), (loss, norm)

    return step


def train(state, step, steps: int, rows: slice):
    told = []
    for index in range(steps):
        tokens = torch.randint(11, (5, 9), generator=torch.Generator().manual_seed(index))[rows]
        plan = SCHEDULE(index, dl.combine(*state[:2]))
        state, metrics = step(state, tokens, torch.tensor(1e-2), plan)
        told.append(torch.stack(metrics))
    return state, torch.stack(told)


def whole_of(state) -> dict:
    """Return parameters and moments of all processes by path, in the form that checkpoints read."""
    placed = dl.parallel.as_dtensors((state[0], state[2]))
    return {path: leaf.full_tensor() if hasattr(leaf, "full_tensor") else leaf for path, leaf in placed.items()}


def _train(base, backend) -> None:
    process, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    group = torch.distributed.group.WORLD
    rows = slice(process * 5 // world_size, (process + 1) * 5 // world_size)
    share = (rows.stop - rows.start) / 5
    expected, wanted = train(start(fresh(base)), make_step(group, share), 12, rows)
    params = dl.parallel.shard_factors(dl.parallel.shard(fresh(base), group), weight=share)
    step = make_step(group, share)
    if backend:
        step = dl.compile_step(step, backend=backend)
    state, told = train(start(params), step, 12, rows)
    dl.parallel.check_replicas(state, group)
    torch.testing.assert_close(told, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(whole_of(state), whole_of(expected), rtol=2e-3, atol=2e-5)
    weights = [dl.state_dict(NET, dl.combine(*result[:2])) for result in (state, expected)]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "base", "backend"), [(3, None, None), (2, "int8", "aot_eager")])
def test_a_step_is_that_of_whole_factors(size, base, backend):
    """The processes do not divide rows and batches evenly."""
    in_processes(size, _train, base, backend)


def _sizes_and_traffic() -> dict:
    group = torch.distributed.group.WORLD
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64, bias=False), nn.GELU()) for _ in range(3)))
    params = dl.init(model, rank=4, seed=0, targets=TARGETS, group=group)
    unsharded, sharded = start(params), start(dl.parallel.shard_factors(params))
    x = torch.ones(512, 64)  # so many that factors are merged into the weight, or gathered

    def loss(trainable):
        return dl.call(model, dl.combine(trainable, sharded[1]), x).square().mean()

    with Traffic() as traffic:
        grads = dl.value_and_grad(loss)(sharded[0]).grads
        dl.parallel.all_reduce_mean(grads, group)
    plan = dl.schedules.every(1)(1, params)
    with Traffic() as switching:
        dl.switch(dl.combine(*sharded[:2]), plan)
    counts = sum(leaf.numel() * 4 for leaf in tree_leaves((sharded[2].inner.count, sharded[2].frozen_for)))
    return {
        "trainable": bytes_of(sharded[0]) / bytes_of(unsharded[0]),
        "moments": (bytes_of(sharded[2]) - counts) / (bytes_of(unsharded[2]) - counts),
        "grads": bytes_of(grads) / bytes_of(unsharded[0]),
        "traffic": traffic.bytes,
        "switching": switching.bytes,
        "wire": dl.parallel.wire_bytes(*sharded[:2], plan=plan),
        "whole": bytes_of(unsharded[0]),
    }


def test_each_process_holds_its_share_and_what_is_sent_is_counted():
    for found in in_processes(4, _sizes_and_traffic):
        assert found["trainable"] == found["moments"] == found["grads"] == 0.25
        wire = found["wire"]
        assert wire.scattered == found["whole"]
        assert wire.gathered == 2 * found["whole"]
        assert wire.reduced == 0
        assert found["traffic"]["all_gather_into_tensor"] == wire.bases + wire.gathered
        assert 4 * found["traffic"]["reduce_scatter_tensor"] == wire.scattered
        assert "all_reduce" not in found["traffic"]
        # Four vectors of `a` that go, and four that `b`'s are multiplied by.
        assert (
            found["switching"] == {"all_gather_into_tensor": wire.switched} == {"all_gather_into_tensor": 3 * 8 * 256}
        )
