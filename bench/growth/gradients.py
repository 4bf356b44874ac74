"""Rows of the memory of eager gradients.

Gradients are computed with `torch.func` or autograd, with and without recomputed blocks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.checkpoint import checkpoint

import dynlora_fn as dl
from bench.growth.row import Contender, Row, at_most_times
from bench.support.training_steps import StepSize, loss_of
from models.llama import TARGETS, Llama

Via = Literal["func", "autograd"]
_WIDTH = 512


class Head(nn.Module):
    """An embedding and an output layer, with nothing in between."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 64)
        self.head = nn.Linear(64, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


def with_remat(model: Llama) -> nn.Module:
    """Let `remat` recompute each block."""
    return dl.remat(model, ["layers.*"])


def with_checkpoints(model: Llama) -> nn.Module:
    """Let `torch.utils.checkpoint` recompute each block."""
    contexts = dl.checkpoint_contexts(model)
    for block in model.layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)
    return model


def unchanged(model: Llama) -> nn.Module:
    return model


def llama_loss(tokens: int, wrap: Callable[[Llama], nn.Module]) -> tuple[Callable[..., Tensor], Any]:
    """Return the loss of a llama as a function of its trainable tree, and this tree."""
    length = min(tokens, 256)
    size = StepSize(width=_WIDTH if tokens > 256 else 64, layers=8, batch=tokens // length, length=length)
    model, batch = size.model("cpu"), size.tokens_on("cpu")
    params = dl.init(model, rank=size.width // 8, seed=0, targets=TARGETS)
    trainable, frozen = dl.partition(params)
    model = wrap(model.to("meta"))
    return lambda tree: loss_of(dl.call(model, dl.combine(tree, frozen), batch[:, :-1]), batch), trainable


def head_loss(vocabulary: int, tokens: int = 256) -> tuple[Callable[..., Tensor], Any]:
    """Return the loss of a model of an embedding and a head, and its parameters.

    The loss is a function of the parameters. They are full-rank.
    """
    model, batch = Head(vocabulary), torch.randint(vocabulary, (1, tokens + 1))
    params = dl.init(model, rank=8, seed=0, targets=[])
    return lambda tree: loss_of(dl.call(model, tree, batch[:, :-1]), batch), params


Build = Callable[[int], tuple[Callable[..., Tensor], Any]]


def ours(build: Build, via: Via) -> Callable[[int], Contender]:
    """Measure `value_and_grad`."""

    def make(size: int) -> Contender:
        loss_fn, trainable = build(size)
        return Contender(partial(dl.value_and_grad(loss_fn, via=via), trainable))

    return make


def plain(build: Build) -> Callable[[int], Contender]:
    """Measure `torch.autograd.grad` with tensors that require a gradient."""

    def make(size: int) -> Contender:
        loss_fn, trainable = build(size)
        leaves, structure = tree_flatten(tree_map(lambda leaf: leaf.requires_grad_(), trainable))
        return Contender(lambda: torch.autograd.grad(loss_fn(tree_unflatten(leaves, structure)), leaves))

    return make


def adamw(vocabulary: int) -> Contender:
    """Measure an update of an embedding and a head."""
    params, optimizer = dl.init(Head(vocabulary), rank=8, seed=0, targets=[]), dl.optim.adamw()
    grads, state = tree_map(torch.ones_like, params), optimizer.init(params)

    def update() -> Any:
        updates, new_state = optimizer.update(grads, state, params, lr=1e-3)
        return dl.apply_updates(params, updates), new_state

    return Contender(update)


def torch_adamw(vocabulary: int) -> Contender:
    """Measure torch's fused update of an embedding and a head, in place."""
    model = Head(vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return Contender(optimizer.step)


_LLAMA, _REMAT, _CHECKPOINTS = (partial(llama_loss, wrap=wrap) for wrap in (unchanged, with_remat, with_checkpoints))
ROWS = {
    "gradients_memory": Row(
        f"peak of gradients of a llama of width {_WIDTH}, eager",
        "tokens",
        (1024, 2048, 4096),
        (64, 128),
        {
            "func": ours(_LLAMA, "func"),
            "autograd": ours(_LLAMA, "autograd"),
            "plain": plain(_LLAMA),
            "func, remat": ours(_REMAT, "func"),
            "autograd, remat": ours(_REMAT, "autograd"),
            "plain, checkpoint": plain(_CHECKPOINTS),
        },
        kind="peak",
        goals=(
            *(at_most_times(1.1, via, "plain") for via in ("func", "autograd")),
            *(at_most_times(1.1, f"{via}, remat", "plain, checkpoint") for via in ("func", "autograd")),
        ),
    ),
    "vocabulary_memory": Row(
        "peak of gradients and updates of an embedding and a head of width 64, 256 tokens, eager",
        "vocabulary",
        (32_000, 64_000, 128_000),
        (1000, 2000),
        {
            "func": ours(head_loss, "func"),
            "autograd": ours(head_loss, "autograd"),
            "plain": plain(head_loss),
            "adamw": adamw,
            "torch.optim, fused, in place": torch_adamw,
        },
        kind="peak",
        goals=tuple(at_most_times(1.1, via, "plain") for via in ("func", "autograd")),
    ),
}
