"""Build each method from the transforms of `dynlora_fn`.

A method is a schedule, an initial state and one pure training step.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_map

import dynlora_fn as dl
from models.llama import TARGETS
from models.pretrain.config import Config
from models.pretrain.device import compute_dtype, run_device
from models.pretrain.optimizer import Optimizer, make_optimizer
from models.pretrain.processes import SINGLE_PROCESS, Processes


class State(NamedTuple):
    """The state that a training step changes."""

    trainable: dict[str, Any]
    frozen: dict[str, Any]
    opt_state: Any

    def params(self) -> dict[str, Any]:
        """Return all parameters in one dict."""
        return dl.combine(self.trainable, self.frozen)


class Metrics(NamedTuple):
    """The results of a training step beside the new state."""

    loss: Tensor
    grad_norm: Tensor  # before clipping
    stop: Tensor  # above 0 if any process has received a signal to stop
    outgoing: dict[str, Any]  # the vectors that were switched out, by the names of their weights


class Method(NamedTuple):
    """A method of training."""

    schedule: dl.schedules.Schedule
    state: State
    pool: dict[str, dl.switching.Pool]
    step: Callable[..., tuple[State, Metrics]]  # (state, tokens, lr, plan, incoming, stop)


def make_method(
    config: Config,
    model: nn.Module,
    targets: Sequence[str] = TARGETS,
    untrained_names: Callable[..., Sequence[str]] = lambda _: (),
    *,
    processes: Processes = SINGLE_PROCESS,
) -> Method:
    """Build the schedule, initial state and step of the method.

    Args:
        config: The options.
        model: The module whose weights are trained.
        targets: Names or globs of the weights to make low-rank if the option `targets` is empty.
        untrained_names: A function of the parameters that returns the names of the full-rank tensors to freeze.
        processes: The processes that divide the batch.
    """
    params = init_params(config, model, targets, processes=processes)
    inner = frozenset(name for name, param in params.items() if isinstance(param, dl.LowRank))
    if config.training.method == "full":
        params = dense_weights(config, model, params)
    if config.machine.shard_factors:
        params = dl.parallel.shard_factors(params, weight=processes.weight(config.data.batch_size))
    optimizer = make_optimizer(config, inner, model)
    untrained = untrained_names(params)
    trainable, frozen = dl.partition(params, frozen=untrained)
    return Method(
        schedule=make_schedule(config),
        state=State(trainable, frozen, optimizer.init(trainable)),
        pool=dl.switching.init_pool(params) if config.switching.candidates == "pool" else {},
        step=make_step(config, model, optimizer, untrained=untrained, processes=processes),
    )


def init_params(
    config: Config, model: nn.Module, targets: Sequence[str], *, processes: Processes = SINGLE_PROCESS
) -> dict[str, Any]:
    """Return the parameters of the model, with each target as a low-rank weight.

    For full, `dense_weights` makes the low-rank weights dense afterwards.
    """
    training, precision = config.training, config.precision
    return dl.init(
        model,
        rank=1 if training.method == "full" else config.rank(),
        alpha=config.alpha(),
        seed=training.seed,
        targets=training.targets or targets,
        start=start(config),
        trained=config.trained(),
        base=None if precision.base_dtype == "float32" else precision.base_dtype,
        residual=None if precision.residual == "none" else precision.residual,
        residual_device=precision.residual_device,
        group=processes.group if config.machine.shard else None,
    )


def dense_weights(config: Config, model: nn.Module, params: dict[str, Any]) -> dict[str, Any]:
    """Return all weights dense, in the shapes of the model.

    Each low-rank weight becomes its base, because its initial product is zero. Full-rank training then has the same
    stacks as the other methods, and the inner optimizer trains the same weights.

    Raises:
        ValueError: If Muon would train a convolution. It would orthogonalize each kernel by itself.
    """

    def dense(name: str, param: Any) -> Any:
        if not isinstance(param, dl.LowRank):
            return param
        shape = model.get_parameter(next(iter(dl.unstack({name: param})))).shape
        if param.base.shape[-len(shape) :] == shape:
            return param.base
        if config.inner_optimizer() == "muon":
            raise ValueError(f"`targets` must be matrices for muon, got {name!r} of a convolution; use adamw")
        return param.base.reshape(*param.base.shape[:-2], *shape)  # the base of a convolution is a matrix

    return {name: dense(name, param) for name, param in params.items()}


def start(config: Config) -> dl.switching.Start:
    """Return the initialization of the factors."""
    return "switchlora" if config.training.method == "switchlora" else "lora"


def make_schedule(config: Config) -> dl.schedules.Schedule:
    """Build the schedule of switches or merges."""
    method, switching = config.training.method, config.switching
    if method == "switchlora":
        return dl.schedules.switchlora(
            config.training.steps, interval=switching.interval, ratio=switching.ratio, freeze=switching.freeze
        )
    return dl.schedules.every(switching.merge_every) if method == "relora" else dl.schedules.never()


def make_step(
    config: Config,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    untrained: Sequence[str] = (),
    processes: Processes = SINGLE_PROCESS,
) -> Callable[..., tuple[State, Metrics]]:
    """Build the training step.

    Args:
        config: The options.
        model: The module whose weights are trained.
        optimizer: The optimizer of the parameters.
        untrained: The names of the full-rank tensors to freeze.
        processes: The processes that divide the batch.
    """
    dtype, device_type, compensate = compute_dtype(config), run_device(config).type, config.training.compensate
    clip, weight = config.optimization.clip, processes.weight(config.data.batch_size)
    updates_first = make_schedule(config).follows_update

    def step(state: State, tokens: Tensor, lr: Tensor, plan: Any, incoming: Any, stop: Tensor) -> tuple[State, Metrics]:
        """Take one step.

        Args:
            state: The state before the step.
            tokens: The tokens, of shape (grad_accum, rows of this process, seq_len + 1).
            lr: The learning rate.
            plan: The plan of the switches, or None for a step without switches.
            incoming: The incoming vectors. None generates them from the basis seed.
            stop: A number above 0 if this process has received a signal to stop.
        """
        trainable, frozen, opt_state = state

        def loss_fn(params: dict[str, Any], tokens: Tensor) -> Tensor:
            params = params if compensate else dl.combine(params, frozen)
            with torch.autocast(device_type, dtype, enabled=dtype != torch.float32):
                return next_token_loss(model, params, tokens)

        differentiated = dl.materialize(state.params()) if compensate else trainable
        loss, grads = mean_over(dl.value_and_grad(loss_fn), differentiated, tokens)
        if processes.group is not None:
            loss, grads, stop = dl.parallel.all_reduce_mean((loss, grads, stop), processes.group, weight=weight)
        if compensate:
            dense, params = grads, state.params()
            grads = {
                name: grad for name, grad in dl.optim.project_gradients(dense, params).items() if name in trainable
            }
            frozen = dl.partition(dl.optim.compensate(params, dense, lr=lr * compensate), frozen=untrained).frozen
        grads, norm = dl.optim.clip_by_global_norm(grads, clip)
        state, outgoing = State(trainable, frozen, opt_state), {}
        if updates_first:
            state = updated(state, grads, lr)
        if plan is not None:
            state, outgoing = switched(state, plan, incoming)
        if not updates_first:
            state = updated(state, grads, lr)
        return state, Metrics(loss, norm, stop, outgoing)

    def updated(state: State, grads: dict[str, Any], lr: Tensor) -> State:
        params = optimizer.decay(state.params(), state.trainable, lr)
        trainable, frozen = dl.partition(params, frozen=untrained)
        updates, opt_state = optimizer.update(grads, state.opt_state, trainable, lr=lr)
        return State(dl.apply_updates(trainable, updates), frozen, opt_state)

    def switched(state: State, plan: Any, incoming: Any) -> tuple[State, dict[str, Any]]:
        params = state.params()
        incoming = dl.candidates(params, plan, start=start(config)) if incoming is None else incoming
        params, outgoing = dl.switch(params, plan, incoming=incoming)
        opt_state = dl.project_optimizer_state(state.opt_state, plan)
        return State(*dl.partition(params, frozen=untrained), opt_state), outgoing

    return step


def mean_over(
    value_and_grad: Callable[..., dl.nn.ValueAndGrad], trainable: Any, microbatches: Tensor
) -> dl.nn.ValueAndGrad:
    """Average loss and gradients over the first axis of `microbatches`.

    The backward passes run one after the other.
    """
    total = value_and_grad(trainable, microbatches[0])
    for microbatch in microbatches[1:]:
        total = tree_map(torch.add, total, value_and_grad(trainable, microbatch))
    return tree_map(lambda leaf: leaf / len(microbatches), total)


def next_token_loss(model: nn.Module, params: dict[str, Any], tokens: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next tokens, in nats per token.

    The model may return logits, or an object with an attribute `logits`.
    """
    output = dl.call(model, params, tokens[..., :-1])
    logits = getattr(output, "logits", output)
    return cross_entropy(logits.flatten(0, -2).float(), tokens[..., 1:].flatten())
