"""A whole training run in which only `b` is trained."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import dynlora_fn as dl
from dynlora_fn.nn._contraction_paths import flops
from dynlora_fn.testing import assert_same, normal
from tests.support.optimizer_table import OPTIMIZERS

SCHEDULE = dl.schedules.Schedule(interval=4, freeze=2)
X = normal(0, 8, 12, dtype=torch.float32)


class Net(nn.Module):
    """Two equal layers, which are stacked, and one of another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, 12, bias=False) for _ in range(2)])
        self.head = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


MODEL = Net()
for index, parameter in enumerate(MODEL.parameters()):
    parameter.data = normal(index, *parameter.shape, dtype=torch.float32) / 4


def params_of(seed: int = 0, **settings):
    return dl.init(MODEL, rank=4, seed=seed, targets=[nn.Linear], trained="b", **settings)


def first_state(optimizer, params):
    trainable, frozen = dl.partition(params)
    return trainable, frozen, optimizer.init(trainable)


def step_of(optimizer):
    def step(state, t):
        trainable, frozen, opt_state = state
        loss, grads = dl.value_and_grad(lambda tree: dl.call(MODEL, dl.combine(tree, frozen), X).square().mean())(
            trainable
        )
        grads, _ = dl.optim.clip_by_global_norm(grads, 1.0)
        params = dl.combine(trainable, frozen)
        plan = SCHEDULE(t, params)
        params, _ = dl.switch(params, plan)
        opt_state = dl.project_optimizer_state(opt_state, plan)
        trainable, frozen = dl.partition(params)
        updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=1e-2)
        return (dl.apply_updates(trainable, updates), frozen, opt_state), loss

    return step


def trained(optimizer, state, steps):
    losses = []
    for t in steps:
        state, loss = step_of(optimizer)(state, torch.tensor(t))
        losses.append(float(loss))
    return state, losses


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("settings", [{}, {"base": "int8", "residual": "int8", "alpha": 2.0}, {"stack": False}])
def test_the_loss_falls_and_the_rows_stay_orthogonal(name, settings):
    optimizer = OPTIMIZERS[name].transform
    state, losses = trained(optimizer, first_state(optimizer, params_of(**settings)), range(20))
    assert losses[-1] < losses[0]
    for weight, param in dl.combine(*state[:2]).items():
        if isinstance(param, dl.LowRank):
            gram = param.factors.a @ param.factors.a.mT * (param.alpha / 4)
            torch.testing.assert_close(gram, torch.eye(4).expand_as(gram), rtol=0, atol=1e-6, msg=weight)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_compiled_step_is_the_eager_one(name):
    optimizer = OPTIMIZERS[name].transform
    eager = first_state(optimizer, params_of())
    compiled, step = tree_map(torch.clone, eager), dl.compile_step(step_of(optimizer), backend="aot_eager")
    for t in range(4):
        (eager, loss), (compiled, compiled_loss) = (
            one(state, torch.tensor(t)) for one, state in ((step_of(optimizer), eager), (step, compiled))
        )
        torch.testing.assert_close(compiled_loss, loss)
    torch.testing.assert_close(tree_leaves(compiled), tree_leaves(eager))


def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path: Path):
    optimizer = OPTIMIZERS["adamw"].transform
    first = first_state(optimizer, params_of(base="int8", residual="bfloat16"))
    half, _ = trained(optimizer, first, range(5))
    dl.interop.save_checkpoint(half, tmp_path, step=5)
    loaded = dl.interop.load_checkpoint(tmp_path, first)
    assert loaded is not None
    resumed, full = (trained(optimizer, state, range(5, 10))[0] for state in (loaded.state, half))
    assert_same(resumed, full)


def test_seeds_train_under_vmap():
    """Members differ in their vectors of `a`, which are mapped over with the frozen tree."""
    optimizer = OPTIMIZERS["adamw"].transform
    states = [first_state(optimizer, params_of(seed)) for seed in range(2)]
    stacked = tree_map(lambda *leaves: torch.stack(leaves), *states)
    step = step_of(optimizer)
    mapped, losses = torch.vmap(step, in_dims=(0, None))(stacked, torch.tensor(0))
    alone = [step(state, torch.tensor(0)) for state in states]
    torch.testing.assert_close(losses, torch.stack([loss for _, loss in alone]))
    wanted = tree_map(lambda *leaves: torch.stack(leaves), *[state for state, _ in alone])
    torch.testing.assert_close(tree_leaves(mapped), tree_leaves(wanted))


def test_an_adapter_has_the_factors_unchanged(tmp_path: Path):
    optimizer = OPTIMIZERS["adamw"].transform
    state, _ = trained(optimizer, first_state(optimizer, params_of(stack=False)), range(6))
    params = dl.combine(*state[:2])
    dl.interop.save_adapter(MODEL, params, tmp_path)
    loaded = dl.interop.load_adapter(MODEL, tmp_path, seed=0, stack=False)
    for name, param in params.items():
        if isinstance(param, dl.LowRank):
            assert_same(tuple(loaded[name].factors[:2]), tuple(param.factors[:2]))


@pytest.fixture
def group() -> Iterator[None]:
    """Start a group of one process."""
    dist.init_process_group(dl.parallel.register_gloo(), store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_a_sharded_base_trains_as_a_whole_one():
    optimizer = OPTIMIZERS["adamw"].transform
    params = params_of()
    sharded = dl.parallel.shard(params, dist.group.WORLD)
    (_, losses), (state, sharded_losses) = (
        trained(optimizer, first_state(optimizer, each), range(6)) for each in (params, sharded)
    )
    torch.testing.assert_close(losses, sharded_losses)
    unsharded = dl.parallel.unshard(dl.combine(*state[:2]))
    assert all(isinstance(param.base, Tensor) for param in unsharded.values() if isinstance(param, dl.LowRank))


@pytest.mark.parametrize("path", ["factored", "merged", "dense"])
def test_the_gradient_of_every_path_is_that_of_both_sides(path):
    param = dl.unstack(params_of())["head.weight"]
    param = param._replace(factors=param.factors._replace(b=normal(1, 8, 4, dtype=torch.float32)))
    trainable, frozen = dl.partition({"w": param})
    both, frozen_both = dl.partition({"w": param._replace(factors=dl.Factors(*param.factors[:2]))})

    def gradients(tree, frozen):
        def loss(tree, x):
            return dl.linear(x, dl.combine(tree, frozen)["w"], path=path).square().sum()

        return torch.func.grad(loss, argnums=(0, 1))(tree, X)

    (grads, grad_x), (wanted, wanted_x) = gradients(trainable, frozen), gradients(both, frozen_both)
    torch.testing.assert_close(grads["w"].b, wanted["w"].b)
    torch.testing.assert_close(grad_x, wanted_x)


def test_products_that_only_the_gradient_of_a_needs_are_not_counted():
    sizes = {"tokens": 64, "out_features": 16, "in_features": 16, "rank": 4}
    for path in ("factored", "merged", "dense"):
        assert flops(path, **sizes, is_one_sided=True) < flops(path, **sizes)
