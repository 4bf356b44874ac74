"""Low-rank methods as training loops over the same transforms. Copy what you need.

Each loop takes a module, a loss function and batches, and returns the trained parameters. The loss is a function of the
model, as a function of its inputs, and a batch.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import dynlora_fn as dl

Loss = Callable[[Callable[..., Any], Any], Tensor]


def loss_of(model: nn.Module, loss: Loss, frozen: Any) -> Callable[[Any, Any], Tensor]:
    """Return the loss as a function of the trainable tree and a batch."""

    def loss_fn(trainable: Any, batch: Any) -> Tensor:
        params = dl.combine(trainable, frozen)
        return loss(lambda *args, **kwargs: dl.call(model, params, *args, **kwargs), batch)

    return loss_fn


def full_rank(model: nn.Module, loss: Loss, batches: Iterable[Any], *, lr: float) -> dict[str, Any]:
    """Train every weight at full rank with AdamW."""
    trainable, frozen = dl.partition(dl.init(model, rank=1, seed=0, targets=[]))
    return descend(model, loss, batches, trainable, frozen, lr=lr)


def lora(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    *,
    targets: dl.interop.Targets,
    rank: int,
    lr: float,
    alpha: float = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Fine-tune the factors only, from the model's weights (arXiv:2106.09685).

    Training starts with ``b = 0``. With PEFT's rank, alpha and rate, a step is as long as PEFT's.
    """
    params = dl.init(model, rank=rank, alpha=alpha, seed=seed, targets=targets, start="lora")
    trainable, frozen = dl.partition(params, frozen=full_rank_names(params))
    return descend(model, loss, batches, trainable, frozen, lr=lr)


def full_rank_names(params: dict[str, Any]) -> list[str]:
    """Return the names of the full-rank parameters, to be frozen by `partition`."""
    return [name for name, param in params.items() if isinstance(param, Tensor)]


def descend(
    model: nn.Module, loss: Loss, batches: Iterable[Any], trainable: Any, frozen: Any, *, lr: float
) -> dict[str, Any]:
    """Take one step of AdamW per batch, and return the parameters."""
    optimizer, value_and_grad = dl.optim.adamw(), dl.value_and_grad(loss_of(model, loss, frozen))
    opt_state = optimizer.init(trainable)
    for batch in batches:
        updates, opt_state = optimizer.update(value_and_grad(trainable, batch).grads, opt_state, trainable, lr=lr)
        trainable = dl.apply_updates(trainable, updates)
    return dl.combine(trainable, frozen)


def chain_of_lora(
    model: nn.Module,
    loss: Loss,
    batches: Sequence[Any],
    *,
    targets: dl.interop.Targets,
    rank: int,
    lr: float,
    links: int,
) -> dict[str, Any]:
    """Train, merge and start again, `links` times (arXiv:2401.04151).

    Each link starts with new factors and a new optimizer state.
    """
    params = dl.init(model, rank=rank, seed=0, targets=targets, start="lora")
    length = -(-len(batches) // links)
    for link in range(links):
        trainable, frozen = dl.partition(params)
        params = descend(model, loss, batches[link * length : (link + 1) * length], trainable, frozen, lr=lr)
        # Switch all vectors: the product is folded into the base, `a` is drawn again, and b = 0.
        plan = dl.schedules.every(1)(link, params)
        params, _ = dl.switch(params, plan, incoming=dl.candidates(params, plan, start="lora"))
    return params


def relora(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    *,
    targets: dl.interop.Targets,
    rank: int,
    lr: float,
    every: int,
    warmup: int,
    prune: float = 0.99,
) -> dict[str, Any]:
    """Merge and redraw the factors every `every` steps (arXiv:2307.05695).

    Each merge prunes most of the optimizer state, and the rate then warms up again over `warmup` steps.
    """
    schedule, optimizer = dl.schedules.every(every), dl.optim.adamw()
    trainable, frozen = dl.partition(dl.init(model, rank=rank, seed=0, targets=targets, start="lora"))
    opt_state = optimizer.init(trainable)
    for step, batch in enumerate(batches):
        grads = dl.value_and_grad(loss_of(model, loss, frozen))(trainable, batch).grads
        rate = lr * min(1.0, (step % every + 1) / max(1, warmup))
        updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=rate)
        params = dl.combine(dl.apply_updates(trainable, updates), frozen)
        if schedule.switches(step, params):
            plan = schedule(step, params)
            params, _ = dl.switch(params, plan, incoming=dl.candidates(params, plan, start="lora"))
            opt_state = dl.project_optimizer_state(opt_state, plan, rule="prune", prune=prune)
        trainable, frozen = dl.partition(params)
    return dl.combine(trainable, frozen)


def switchlora(
    model: nn.Module,
    loss: Loss,
    batches: Sequence[Any],
    *,
    targets: dl.interop.Targets,
    rank: int,
    lr: float,
    interval: float = 40,
    is_pooled: bool = False,
) -> dict[str, Any]:
    """Switch a few vectors at each step (arXiv:2406.06564).

    The vectors that enter are generated from a seed, or with `is_pooled` taken from a pool.
    """
    schedule, optimizer = dl.schedules.switchlora(len(batches), interval=interval), dl.optim.adamw()
    params = dl.init(model, rank=rank, seed=0, targets=targets)
    pool = dl.switching.init_pool(params) if is_pooled else None
    trainable, frozen = dl.partition(params)
    opt_state = optimizer.init(trainable)
    for step, batch in enumerate(batches):
        grads = dl.value_and_grad(loss_of(model, loss, frozen))(trainable, batch).grads
        params = dl.combine(trainable, frozen)
        plan = schedule(step, params)
        incoming = dl.candidates(params, plan) if pool is None else dl.switching.draw(pool, plan)
        params, outgoing = dl.switch(params, plan, incoming=incoming)
        pool = None if pool is None else dl.switching.put_back(pool, plan, outgoing)
        opt_state = dl.project_optimizer_state(opt_state, plan)
        trainable, frozen = dl.partition(params)
        updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=lr)
        trainable = dl.apply_updates(trainable, updates)
    return dl.combine(trainable, frozen)


def accumulated(value_and_grad: Callable[..., dl.nn.ValueAndGrad], trainable: Any, microbatches: Sequence[Any]) -> Any:
    """Return the gradients of the mean loss over microbatches.

    The backward passes run one after the other.
    """
    total = value_and_grad(trainable, microbatches[0]).grads
    for microbatch in microbatches[1:]:
        total = tree_map(torch.add, total, value_and_grad(trainable, microbatch).grads)
    return tree_map(lambda leaf: leaf / len(microbatches), total)


def per_sample_gradients(model: nn.Module, loss: Loss, params: dict[str, Any], samples: Any) -> Any:
    """Return the gradients for each sample, along a new first axis.

    All samples are computed in one call. The loss gets each sample as a batch of size 1.
    """
    trainable, frozen = dl.partition(params)
    gradients = torch.func.grad(loss_of(model, loss, frozen))
    return torch.vmap(gradients, in_dims=(None, 0))(trainable, tree_map(lambda leaf: leaf[:, None], samples))


def ensemble(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    *,
    targets: dl.interop.Targets,
    rank: int,
    seeds: Sequence[int],
    lrs: Sequence[float],
) -> tuple[Any, Any]:
    """Train several LoRAs over one base, from different seeds or at different rates.

    Return the trainable tree, with the members along the first axis of each leaf, and the frozen tree that they share.
    """
    params = dl.init(model, rank=rank, seed=0, targets=targets, start="lora")
    frozen = dl.partition(params, frozen=full_rank_names(params)).frozen
    trainable = tree_map(lambda *leaves: torch.stack(leaves), *(lora_factors(params, seed) for seed in seeds))
    optimizer, gradients = dl.optim.adamw(), torch.func.grad(loss_of(model, loss, frozen))
    opt_state = torch.vmap(optimizer.init)(trainable)

    def step(trainable: Any, opt_state: Any, lr: Tensor, batch: Any) -> tuple[Any, Any]:
        updates, opt_state = optimizer.update(gradients(trainable, batch), opt_state, trainable, lr=lr)
        return dl.apply_updates(trainable, updates), opt_state

    for batch in batches:
        trainable, opt_state = torch.vmap(step, in_dims=(0, 0, 0, None))(trainable, opt_state, torch.tensor(lrs), batch)
    return trainable, frozen


def lora_factors(params: dict[str, Any], seed: int) -> dict[str, dl.Factors]:
    """Return LoRA's initial factors with ``b = 0``, from a basis that `seed` selects."""
    low_rank = {name: param for name, param in params.items() if isinstance(param, dl.LowRank)}
    reseeded = {name: param._replace(seed=param.seed + seed) for name, param in low_rank.items()}
    plan = dl.schedules.every(1)(0, reseeded)
    return dl.candidates(reseeded, plan, start="lora")
