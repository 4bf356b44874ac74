"""The same numbers on a CUDA device as on the host."""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import dynlora_fn as dl
from dynlora_fn.switching._basis import Request, uniform
from dynlora_fn.testing import assert_same
from models import mlp

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, none is there"),
]


def test_basis_has_the_same_bits():
    seed, indices = torch.tensor([3, 2**62 + 1]), torch.arange(40)
    (host,) = uniform([Request(seed, "a", indices, 33)])
    (device,) = uniform([Request(seed.cuda(), "a", indices.cuda(), 33)])
    assert torch.equal(host, device.cpu())


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.inductor)])
@pytest.mark.parametrize("residual", ["bfloat16", "int8"])
def test_residuals_in_host_memory_are_folded_into_as_on_the_device(residual, is_compiled):
    """Residuals on the device and on the host give the same bits, and each stays on its device."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).cuda()
    (param,) = dl.init({"w": weight}, rank=8, seed=0, targets=["w"]).values()
    near, far = (
        dl.bases.quantize(param, "int8", residual=residual, residual_device=device) for device in ("cuda", "cpu")
    )
    schedule = dl.schedules.switchlora(100, interval=10)
    switch = torch.compile(dl.switch, fullgraph=True) if is_compiled else dl.switch
    for step in range(20):
        plan = schedule(step, {"w": param})["w"]
        near, far = switch(near, plan).param, switch(far, plan).param
    near, far = dl.merge(near), dl.merge(far)
    assert {leaf.device.type for leaf in tree_leaves(far.base.residual)} == {"cpu"}
    assert {leaf.device.type for leaf in tree_leaves((far.base.codes, far.factors))} == {"cuda"}
    assert_same(*(tree_map(torch.Tensor.cpu, tree) for tree in (far, near)))


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.inductor)])
def test_training_with_switches_agrees_with_the_host(is_compiled: bool):
    model = mlp.MLP([16, 16, 16, 8])
    params = dl.init(model, rank=4, seed=0, targets=mlp.TARGETS)
    batches = torch.randn(20, 32, 16, generator=torch.Generator().manual_seed(0))
    schedule, optimizer = dl.schedules.switchlora(20, interval=10), dl.optim.adamw()

    def step(state, batch, lr):
        trainable, frozen, opt_state, t = state
        loss, grads = dl.value_and_grad(lambda tr: dl.call(model, dl.combine(tr, frozen), batch).square().mean())(
            trainable
        )
        params = dl.combine(trainable, frozen)
        plan = schedule(t, params)
        params, _ = dl.switch(params, plan)
        opt_state = dl.project_optimizer_state(opt_state, plan)
        trainable, frozen = dl.partition(params)
        updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=lr)
        return (dl.apply_updates(trainable, updates), frozen, opt_state, t + 1), loss

    def run(device: str) -> tuple:
        trainable, frozen = dl.partition(params)
        state = (trainable, frozen, optimizer.init(trainable), torch.tensor(0))
        state = tree_map(lambda leaf: leaf.to(device, copy=True), state)
        stepper = dl.compile_step(step) if is_compiled and device == "cuda" else step
        for batch in batches:
            state, _ = stepper(state, batch.to(device), torch.tensor(1e-3, device=device))
        return tree_map(torch.Tensor.cpu, dl.materialize(dl.combine(state[0], state[1])))

    torch.testing.assert_close(run("cuda"), run("cpu"), atol=1e-4, rtol=1e-3)
