"""`explain` describes the parameters, and `peak_memory` measures a step."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from dynlora_fn import call, combine, explain, init, partition, peak_memory, remat, value_and_grad
from dynlora_fn.optim import adamw
from dynlora_fn.testing import normal


def make(**settings: str) -> dict:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)), nn.Linear(64, 16))
    return init(model, rank=8, seed=0, targets=["*.weight"], **settings)


def size(tree) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree))


@pytest.mark.parametrize("trained", ["both", "b"])
def test_bytes_are_those_of_the_state(trained: str):
    params = make(trained=trained)
    trainable, frozen = partition(params)
    costs = explain(params, tokens=256).costs
    assert [cost.name for cost in costs] == list(params)
    assert sum(cost.base for cost in costs) == size(frozen)
    assert sum(cost.trainable for cost in costs) == sum(cost.gradient for cost in costs) == size(trainable)
    assert sum(cost.optimizer for cost in costs) == size(adamw().init(trainable))


def test_full_rank_stands_beside():
    params, dense = make(), init(nn.Linear(64, 64, bias=False), rank=1, seed=0, targets=[])
    trainable = partition(dense).trainable
    (full,) = explain(dense, tokens=256).costs
    assert full.full == 2 * size(trainable) + size(adamw().init(trainable))
    (single,) = explain(init(nn.Linear(64, 64, bias=False), rank=8, seed=0, targets=["weight"]), tokens=256).costs
    assert single.full == full.full
    assert single.full_flops == 6 * 256 * 64 * 64
    stacked = next(cost for cost in explain(params, tokens=256).costs if cost.shape == (3, 64, 64))
    assert (stacked.flops, stacked.full_flops) == (3 * single.flops, 3 * single.full_flops)
    assert stacked.merged == single.merged == 64 * 64 * 4


def test_an_explanation_is_a_table():
    lines = str(explain(make(), tokens=256)).splitlines()
    assert lines[0] == "one step of 256 tokens"
    assert "*.weight  3x64x64  8     merged" in next(line for line in lines if line.startswith("*.weight"))
    assert lines[-2].startswith("all")


# --- peak_memory
N = 1000  # numbers of 8 bytes


@pytest.mark.parametrize(
    ("function", "vectors"),
    [
        (lambda x: x.sin().cos().exp(), 0),  # written over the argument
        (lambda x: (x.sin().cos() * x).sum(), 0),  # only one number
        (lambda x: torch.cumsum(x.sin(), 0), 2),  # read completely by an operation that does not fuse
        (lambda x: torch.cumsum(torch.cumsum(x, 0), 0).sum(), 2),  # the first is freed after the second is allocated
        (lambda x: torch.cumsum(torch.cumsum(torch.cumsum(x, 0), 0), 0).sum(), 2),
        (lambda x: torch.cumsum(x, 0) + torch.cumsum(x, 0).cos(), 2),
        (lambda x: x.view(10, -1).mT, 0),
    ],
)
def test_the_peak_of_known_functions(function, vectors):
    peak = peak_memory(function, normal(0, N))
    assert peak.state == 8 * N
    assert 8 * N * vectors <= peak.step <= 8 * N * vectors + 8
    assert peak.total == peak.state + peak.step


def test_nothing_is_run():
    """These sizes exceed the memory of any machine."""
    x = torch.empty(10**6, 10**6, device="meta")
    assert peak_memory(lambda x: x @ x, x).step == 4 * 10**12


def gradient_peak(model: nn.Module, params: dict) -> int:
    trainable, frozen = partition(params)

    def gradients(trainable, x):
        return value_and_grad(lambda tree: call(model, combine(tree, frozen), x).square().mean())(trainable).grads

    return peak_memory(gradients, tree_map(torch.clone, trainable), normal(0, 512, 64, dtype=torch.float32)).step


@pytest.mark.slow
def test_remat_lowers_the_peak():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

        def forward(self, x):
            return x + self.down(self.up(x).relu())

    model = nn.Sequential(*(Block() for _ in range(8)))
    params = init(model, rank=4, seed=0, targets=["*.weight"])
    assert gradient_peak(remat(model, ["?"]), params) < gradient_peak(model, params) / 2
