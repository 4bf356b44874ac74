"""The methods as compositions of the transforms: parameters, schedule and one pure training step."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_map

import dynlora_fn as dl
from models.llama import TARGETS
from models.pretrain.config import Config
from models.pretrain.ranks import ALONE, Ranks


class State(NamedTuple):
    """What a step changes."""

    trainable: dict[str, Any]
    frozen: dict[str, Any]
    opt_state: Any

    def params(self) -> dict[str, Any]:
        return dl.combine(self.trainable, self.frozen)


class Metrics(NamedTuple):
    loss: Tensor
    grad_norm: Tensor
    stop: Tensor  # above 0 if any process was asked to end
    outgoing: dict[str, dl.Factors]  # vectors that were switched out


class Method(NamedTuple):
    schedule: dl.schedules.Schedule
    state: State
    pool: dict[str, dl.switching.Pool]
    step: Callable[..., tuple[State, Metrics]]  # (state, tokens, lr, plan, incoming, stop)


def make_method(
    config: Config,
    model: nn.Module,
    targets: Sequence[str] = TARGETS,
    still: Callable[..., Sequence[str]] = lambda _: (),
    *,
    ranks: Ranks = ALONE,
) -> Method:
    """The method with `targets` unless the settings name others; `still` says of the parameters which full-rank ones
    are not trained."""
    params = init_params(config, model, targets, ranks=ranks)
    if config.shard_factors:
        params = dl.parallel.shard_factors(params, weight=ranks.share(config.batch_size))
    optimizer = make_optimizer(config, inner_names(config, params, targets))
    names = still(params)
    trainable, frozen = dl.partition(params, frozen=names)
    return Method(
        schedule=make_schedule(config),
        state=State(trainable, frozen, optimizer.init(trainable)),
        pool=dl.switching.init_pool(params) if config.candidates == "pool" else {},
        step=make_step(config, model, optimizer, still=names, ranks=ranks),
    )


def init_params(config: Config, model: nn.Module, targets: Sequence[str], *, ranks: Ranks = ALONE) -> dict[str, Any]:
    return dl.init(
        model,
        rank=config.rank,
        seed=config.seed,
        targets=[] if config.method == "full" else config.targets or targets,
        start=start(config),
        base=None if config.base_dtype == "float32" else config.base_dtype,
        residual=None if config.residual == "none" else config.residual,
        residual_device=config.residual_device,
        group=ranks.group if config.shard else None,
    )


def inner_names(config: Config, params: dict[str, Any], targets: Sequence[str]) -> frozenset[str]:
    """The low-rank weights, and for full those that would be."""
    globs = config.targets or targets if config.method == "full" else ()
    return frozenset(
        name
        for name, param in params.items()
        if isinstance(param, dl.LowRank) or any(fnmatchcase(name, glob) for glob in globs)
    )


def make_optimizer(config: Config, inner: frozenset[str]) -> dl.optim.Transform:
    """Takes one learning rate, that of the `inner` weights."""
    adamw = dl.optim.adamw(weight_decay=config.weight_decay, moments=config.moments)
    optimizers = {"adamw": adamw, "muon": dl.optim.muon(weight_decay=config.weight_decay)}
    transforms = {"inner": optimizers[config.inner_optimizer()], "rest": adamw}
    both = dl.optim.multi_transform(transforms, lambda name, _: "inner" if name in inner else "rest")

    def update(grads: Any, opt_state: Any, trainable: Any, *, lr: Tensor) -> dl.optim.Updates:
        rates = {name: lr if name in inner else lr * config.dense_share() for name in trainable}
        return both.update(grads, opt_state, trainable, lr=rates)

    return dl.optim.Transform(both.init, update)


def start(config: Config) -> dl.switching.Start:
    return "switchlora" if config.method == "switchlora" else "lora"


def make_schedule(config: Config) -> dl.schedules.Schedule:
    if config.method == "switchlora":
        return dl.schedules.switchlora(config.steps, interval=config.interval, ratio=config.ratio, freeze=config.freeze)
    return dl.schedules.every(config.merge_every) if config.method == "relora" else dl.schedules.never()


def make_step(
    config: Config, model: nn.Module, optimizer: dl.optim.Transform, *, still: Sequence[str] = (), ranks: Ranks = ALONE
) -> Callable[..., tuple[State, Metrics]]:
    """`still` names full-rank tensors that are not trained."""
    dtype, device_type = config.compute_torch_dtype(), config.torch_device().type
    share = ranks.share(config.batch_size)

    def step(state: State, tokens: Tensor, lr: Tensor, plan: Any, incoming: Any, stop: Tensor) -> tuple[State, Metrics]:
        """`tokens` is (grad_accum, rows of this process, seq_len + 1); without a plan nothing is switched, and without
        incoming vectors they are drawn from the basis."""
        trainable, frozen, opt_state = state

        def loss_fn(given: dict[str, Any], tokens: Tensor) -> Tensor:
            params = given if config.compensate else dl.combine(given, frozen)
            with torch.autocast(device_type, dtype, enabled=dtype != torch.float32):
                return next_token_loss(model, params, tokens)

        given = dl.materialize(state.params()) if config.compensate else trainable
        loss, grads = mean_over(dl.value_and_grad(loss_fn), given, tokens)
        if ranks.group is not None:
            loss, grads, stop = dl.parallel.all_reduce_mean(
                (loss, grads, stop), ranks.group, weight=share, frozen=frozen
            )
        if config.compensate:
            dense, params = grads, state.params()
            grads = {
                name: grad for name, grad in dl.optim.project_gradients(dense, params).items() if name in trainable
            }
            frozen = dl.partition(dl.optim.compensate(params, dense, lr=lr * config.compensate), frozen=still).frozen
        grads, norm = dl.optim.clip_by_global_norm(grads, config.clip, frozen=frozen)
        outgoing: dict[str, dl.Factors] = {}
        if plan is not None:
            params = dl.combine(trainable, frozen)
            incoming = dl.candidates(params, plan, start=start(config)) if incoming is None else incoming
            params, outgoing = dl.switch(params, plan, incoming=incoming)
            opt_state = dl.project_optimizer_state(opt_state, plan)
            trainable, frozen = dl.partition(params, frozen=still)
        updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=lr)
        return State(dl.apply_updates(trainable, updates), frozen, opt_state), Metrics(loss, norm, stop, outgoing)

    return step


def mean_over(
    value_and_grad: Callable[..., dl.nn.ValueAndGrad], trainable: Any, microbatches: Tensor
) -> dl.nn.ValueAndGrad:
    """Loss and gradients averaged over the first axis, one backward pass at a time."""
    total = value_and_grad(trainable, microbatches[0])
    for microbatch in microbatches[1:]:
        total = tree_map(torch.add, total, value_and_grad(trainable, microbatch))
    return tree_map(lambda leaf: leaf / len(microbatches), total)


def next_token_loss(model: nn.Module, params: dict[str, Any], tokens: Tensor) -> Tensor:
    """Mean cross-entropy in nats a token, of a model that returns logits, or an output that has them."""
    output = dl.call(model, params, tokens[..., :-1])
    logits = getattr(output, "logits", output)
    return cross_entropy(logits.flatten(0, -2).float(), tokens[..., 1:].flatten())
