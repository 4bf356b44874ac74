"""The methods as compositions of the transforms.

A method is a schedule, a first state and one pure training step.
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
    """What a step changes."""

    trainable: dict[str, Any]
    frozen: dict[str, Any]
    opt_state: Any

    def params(self) -> dict[str, Any]:
        return dl.combine(self.trainable, self.frozen)


class Metrics(NamedTuple):
    loss: Tensor
    grad_norm: Tensor
    stop: Tensor  # above 0 if any process has received SIGTERM
    outgoing: dict[str, Any]  # factors by name: vectors that were switched out


class Method(NamedTuple):
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
    """Return the schedule, first state and step of the method.

    Args:
        config: The options.
        model: The module whose weights are trained.
        targets: Names or globs of the weights that become low-rank where the option `targets` is empty.
        untrained_names: A function of the parameters. It returns the names of full-rank tensors that are not trained.
        processes: The processes that share the work.
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
    """Return the parameters, low-rank for every target.

    For full, `dense_weights` makes them dense again.
    """
    training, precision = config.training, config.precision
    return dl.init(
        model,
        rank=1 if training.method == "full" else training.rank,
        alpha=config.alpha(),
        seed=training.seed,
        targets=training.targets or targets,
        start=start(config),
        trained=training.trained,
        base=None if precision.base_dtype == "float32" else precision.base_dtype,
        residual=None if precision.residual == "none" else precision.residual,
        residual_device=precision.residual_device,
        group=processes.group if config.machine.shard else None,
    )


def dense_weights(config: Config, model: nn.Module, params: dict[str, Any]) -> dict[str, Any]:
    """Return all weights dense, in the shapes of the model.

    The products of the bases are still zero. So full-rank training has the stacks of the other methods, and their
    targets are what the inner optimizer trains.

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
        return param.base.reshape(*param.base.shape[:-2], *shape)  # a convolution, whose base is a matrix

    return {name: dense(name, param) for name, param in params.items()}


def start(config: Config) -> dl.switching.Start:
    return "switchlora" if config.training.method == "switchlora" else "lora"


def make_schedule(config: Config) -> dl.schedules.Schedule:
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
    """Return the training step.

    `untrained` names the full-rank tensors that are not trained.
    """
    dtype, device_type, compensate = compute_dtype(config), run_device(config).type, config.training.compensate
    clip, weight = config.optimization.clip, processes.weight(config.data.batch_size)
    updates_first = make_schedule(config).follows_update

    def step(state: State, tokens: Tensor, lr: Tensor, plan: Any, incoming: Any, stop: Tensor) -> tuple[State, Metrics]:
        """Take one step. `tokens` is (grad_accum, rows of this process, seq_len + 1).

        Without a plan nothing is switched. Without incoming vectors they are generated from the basis seed.
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
    """Return loss and gradients averaged over the first axis.

    The backward passes run one after the other.
    """
    total = value_and_grad(trainable, microbatches[0])
    for microbatch in microbatches[1:]:
        total = tree_map(torch.add, total, value_and_grad(trainable, microbatch))
    return tree_map(lambda leaf: leaf / len(microbatches), total)


def next_token_loss(model: nn.Module, params: dict[str, Any], tokens: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats per token.

    The model returns logits, or an output with a field `logits`.
    """
    output = dl.call(model, params, tokens[..., :-1])
    logits = getattr(output, "logits", output)
    return cross_entropy(logits.flatten(0, -2).float(), tokens[..., 1:].flatten())
