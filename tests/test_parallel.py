"""Tensor parallelism of the models here: the step of one process, in parts."""

import pytest
import torch
from ranks import in_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import implicit_replication
from torch.utils._pytree import tree_leaves

import dynlora_fn as dl
from models import llama, parallel
from models.pretrain.method import next_token_loss

MODEL = llama.init_weights(llama.Llama(llama.config("llama-tiny", 31)), 0)
SCHEDULE = dl.switchlora(40, interval=10, ratio=1.0)


def tokens(step: int) -> torch.Tensor:
    return torch.randint(31, (4, 17), generator=torch.Generator().manual_seed(step))


def step_of(mesh=None):
    optimizer = dl.adamw()

    def step(state, tokens, lr, plan):
        trainable, frozen, opt_state = state

        def loss_fn(trainable, frozen, tokens):
            return next_token_loss(MODEL, dl.combine(trainable, frozen), tokens)

        if mesh is None:
            loss, grads = dl.value_and_grad(loss_fn)(trainable, frozen, tokens)
            params, _ = dl.switch(dl.combine(trainable, frozen), plan)
        else:
            given = parallel.placed(trainable, mesh), parallel.placed(frozen, mesh)
            loss, grads = parallel.value_and_grad(loss_fn, mesh)(*given, tokens)
            params = parallel.switch(dl.combine(trainable, frozen), plan, mesh)
        opt_state = dl.project_optimizer_state(opt_state, plan)
        trainable, frozen = dl.partition(params)
        updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=lr)
        return (dl.apply_updates(trainable, updates), frozen, opt_state), loss

    return step


def train(params, step, whole, steps: int = 6):
    trainable, frozen = dl.partition(params)
    state, losses = (trainable, frozen, dl.adamw().init(trainable)), []
    for number in range(steps):
        plan = SCHEDULE(number, whole(dl.combine(*state[:2])))
        state, loss = step(state, tokens(number), torch.tensor(1e-2), plan)
        losses.append(loss.item())
    return dl.combine(*state[:2]), losses


def _train(backend) -> None:
    mesh = init_device_mesh("cpu", (2,))
    params = dl.init(MODEL, rank=4, seed=0, targets=llama.TARGETS)
    expected, wanted = train(params, step_of(), dict)
    parts = parallel.split(params, mesh)
    low_rank = [name for name, param in params.items() if isinstance(param, dl.LowRank)]
    for name in low_rank:
        assert 2 * parts[name].base.numel() == params[name].base.numel()
    step = step_of(mesh)
    if backend:
        step = dl.compile_step(step, backend=backend)
    with implicit_replication():
        parts, losses = train(parts, step, lambda parts: parallel.outline(parts, mesh))
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=0)
    whole = parallel.joined(parts, mesh)
    assert len(low_rank) == 7
    torch.testing.assert_close(whole, expected, rtol=1e-3, atol=2e-5)
    dl.check_replicas(tree_leaves(whole), mesh)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_step_in_parts_is_that_of_the_whole(backend):
    in_ranks(2, _train, backend)
