"""Rows of models with many weights that are not stacked.

They measure calls, gradients, updates, switches, and the first call of a compiled step.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import dynlora_fn as dl
from bench.growth.models import WIDTH, chain, in_peft
from bench.growth.row import Contender, Row, at_most_times, grows_at_most

_RANK, _TOKENS = 8, 64
_ALL_LAYERS = r"\d+"  # a regular expression for PEFT that matches all layers of a chain


def inputs() -> Tensor:
    return torch.randn(_TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))


def params_of(model: nn.Module) -> dict[str, Any]:
    """Return low-rank weights that are not stacked."""
    return dl.init(model, rank=_RANK, seed=0, targets=["*.weight"], stack=False)


def loss_of(output: Tensor) -> Tensor:
    return output.square().mean()


def forward(count: int) -> Contender:
    model, x = chain(count), inputs()
    params = params_of(model)
    return Contender(torch.no_grad()(lambda: dl.call(model, params, x)))


def gradients(via: Any) -> Callable[[int], Contender]:
    def make(count: int) -> Contender:
        model, x = chain(count), inputs()
        trainable, frozen = dl.partition(params_of(model))
        loss_fn = lambda tree: loss_of(dl.call(model, dl.combine(tree, frozen), x))  # noqa: E731
        return Contender(partial(dl.value_and_grad(loss_fn, via=via), trainable))

    return make


def peft_forward(count: int) -> Contender:
    model, x = in_peft(chain(count), _RANK, _ALL_LAYERS), inputs()
    return Contender(torch.no_grad()(lambda: model(x)))


def peft_gradients(count: int) -> Contender:
    model, x = in_peft(chain(count), _RANK, _ALL_LAYERS), inputs()

    def run() -> None:
        model.zero_grad()
        loss_of(model(x)).backward()

    return Contender(run)


def adamw(count: int) -> Contender:
    trainable, optimizer = dl.partition(params_of(chain(count))).trainable, dl.optim.adamw()
    grads, state = tree_map(torch.ones_like, trainable), optimizer.init(trainable)

    def update() -> Any:
        updates, new_state = optimizer.update(grads, state, trainable, lr=1e-3)
        return dl.apply_updates(trainable, updates), new_state

    return Contender(update)


def torch_adamw(**options: Any) -> Callable[[int], Contender]:
    def make(count: int) -> Contender:
        leaves = tree_leaves(dl.partition(params_of(chain(count))).trainable)
        for leaf in leaves:
            leaf.requires_grad_()
            leaf.grad = torch.ones_like(leaf)
        return Contender(torch.optim.AdamW(leaves, **options).step)

    return make


def switch(count: int) -> Contender:
    params = params_of(chain(count))
    plan = dl.schedules.every(1, 1)(1, params)
    return Contender(partial(dl.switch, params, plan))


def schedule(count: int) -> Contender:
    params = params_of(chain(count))
    return Contender(partial(dl.schedules.switchlora(1000), 1, params))


def peft_merge(count: int) -> Contender:
    model = in_peft(chain(count), _RANK, _ALL_LAYERS)

    def run() -> None:
        model.merge_adapter()
        model.unmerge_adapter()

    return Contender(run)


def first_call(count: int) -> Contender:
    """Measure a compiled step until its first result.

    The step computes gradients, a switch and an update.
    """
    model, x, optimizer = chain(count), inputs(), dl.optim.adamw()
    params = params_of(model)
    plan, lr = dl.schedules.every(1, 1)(1, params), torch.tensor(1e-3)

    def step(state: Any, x: Tensor, lr: Tensor, plan: Any) -> tuple[Any, Tensor]:
        trainable, frozen, opt_state = state
        loss, grads = dl.value_and_grad(lambda tree: loss_of(dl.call(model, dl.combine(tree, frozen), x)))(trainable)
        params, _ = dl.switch(dl.combine(trainable, frozen), plan)
        opt_state = dl.project_optimizer_state(opt_state, plan)
        trainable, frozen = dl.partition(params)
        updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=lr)
        return (dl.apply_updates(trainable, updates), frozen, opt_state), loss

    trainable, frozen = dl.partition(params)
    state = trainable, frozen, optimizer.init(trainable)
    return Contender(lambda: dl.compile_step(step, backend="aot_eager")(state, x, lr, plan), _without_graphs)


def peft_first_call(count: int) -> Contender:
    """Measure a step of PEFT's model until its first result.

    The forward and backward pass is compiled. The update is by torch.
    """
    model, x = in_peft(chain(count), _RANK, _ALL_LAYERS), inputs()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])

    def run() -> None:
        compiled = torch.compile(model.get_base_model(), backend="aot_eager", fullgraph=True, dynamic=False)
        loss_of(compiled(x)).backward()
        optimizer.step()

    return Contender(run, _without_graphs)


def _without_graphs() -> tuple[()]:
    torch.compiler.reset()
    return ()


_COUNTS, _FEW = (100, 250, 500), (4, 8)
ROWS = {
    "calls": Row(
        f"calls of linear layers of width {WIDTH}, rank {_RANK}, {_TOKENS} tokens, eager",
        "weights",
        _COUNTS,
        _FEW,
        {
            "forward": forward,
            "func": gradients("func"),
            "autograd": gradients("autograd"),
            "PEFT": peft_forward,
            "PEFT's gradients": peft_gradients,
        },
        goals=(
            at_most_times(1.5, "forward", "PEFT"),
            *(at_most_times(2, via, "PEFT's gradients") for via in ("func", "autograd")),
            grows_at_most(1.1, "forward"),
        ),
    ),
    "updates": Row(
        f"updates and switches of weights of width {WIDTH}, rank {_RANK}, eager",
        "weights",
        _COUNTS,
        _FEW,
        {
            "adamw": adamw,
            "torch.optim, foreach": torch_adamw(foreach=True),
            "torch.optim, fused": torch_adamw(fused=True),
            "switch": switch,
            "schedule": schedule,
            "PEFT's merge and unmerge": peft_merge,
        },
        goals=(at_most_times(1.5, "adamw", "torch.optim, foreach"), grows_at_most(1.1, "adamw")),
    ),
    "first_call": Row(
        "first call of a step, aot_eager",
        "weights",
        (16, 64, 128),
        (1, 2),
        {"compile_step": first_call, "PEFT, torch.compile": peft_first_call},
        goals=(at_most_times(2, "compile_step", "PEFT, torch.compile"),),
        rounds=1,
    ),
}
