"""A complete training step with switches, on a small network."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dynlora_fn import apply_updates, call, combine, init, partition, project_optimizer_state, switch, value_and_grad
from dynlora_fn.optim import adamw, clip_by_global_norm
from dynlora_fn.schedules import Schedule
from dynlora_fn.testing import normal
from tests.support.optimizers import decaying_adamw

MAX_NORM = 0.5
RANK = 2


class Net(nn.Module):
    """Has two equal layers, which become a stack, and one of another shape."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x)


class TrainState(NamedTuple):
    trainable: Any
    frozen: Any
    opt_state: Any
    step: Tensor  # 0-d int64


class Run(NamedTuple):
    state: TrainState
    step: Callable


def make_run(
    schedule: Callable,
    *,
    dtype: torch.dtype = torch.float64,
    start: str = "switchlora",
    weight_decay: float = 0.0,
    max_norm: float = MAX_NORM,
) -> Run:
    torch.manual_seed(0)
    net, optimizer = Net().to(dtype), decaying_adamw(weight_decay) if weight_decay else adamw()
    params = init(net, rank=RANK, seed=0, targets=["*.weight"], dtype=dtype, start=start)

    def step(state: TrainState, x: Tensor, y: Tensor, lr: Tensor) -> tuple[TrainState, dict[str, Tensor]]:
        def loss_fn(trainable: Any) -> Tensor:
            return (call(net, combine(trainable, state.frozen), x) - y).square().mean()

        loss, grads = value_and_grad(loss_fn)(state.trainable)
        grads, norm = clip_by_global_norm(grads, max_norm)
        params = combine(state.trainable, state.frozen)
        plan = schedule(state.step, params)
        params, _ = switch(params, plan)
        opt_state = project_optimizer_state(state.opt_state, plan)
        trainable, frozen = partition(params)
        updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=lr)
        return TrainState(apply_updates(trainable, updates), frozen, opt_state, state.step + 1), {
            "loss": loss,
            "norm": norm,
        }

    trainable, frozen = partition(params)
    return Run(TrainState(trainable, frozen, optimizer.init(trainable), torch.tensor(0)), step)


def batches(steps: int, dtype: torch.dtype = torch.float64) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield data, and a learning rate that warms up and falls."""
    for step in range(steps):
        x, y = normal(2 * step, 8, 6, dtype=dtype), normal(2 * step + 1, 8, 4, dtype=dtype)
        yield x, y, torch.tensor(0.02 * min(1, (step + 1) / 10) * 0.98**step, dtype=dtype)


# Rank 2 and interval 10: a side switches a vector every five steps at first, and then more rarely.
SWITCHING = Schedule(interval=10, decay=0.99, freeze=3)


def run_for(run: Run, steps: int, step: Callable | None = None, dtype: torch.dtype = torch.float64) -> list[Any]:
    """Return copies of the state and of the auxiliary output after each step."""
    state, history = run.state, []
    for batch in batches(steps, dtype):
        state, aux = (step or run.step)(state, *batch)
        history.append(tree_map(torch.clone, (state, aux)))
    return history
