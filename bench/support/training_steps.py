"""Build training steps of a llama with each method."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dynlora_fn as dl
from models.llama import CONFIGS, TARGETS, Llama, LlamaConfig, init_weights

LR = 1e-3
SCHEDULE_STEPS = 40_000  # length of the run in the paper, from which the schedule follows


@dataclass(frozen=True)
class StepSize:
    """The model and the batch of a measured step."""

    width: int = 512
    layers: int = 8
    batch: int = 8
    length: int = 256
    vocabulary: int = 256
    heads: int = 8

    @property
    def tokens(self) -> int:
        """The number of tokens of a step."""
        return self.batch * self.length

    def config(self) -> LlamaConfig:
        """Return the configuration of the model."""
        hidden = next((c.hidden for c in CONFIGS.values() if c.width == self.width), 16 * round(self.width / 6))
        return replace(
            CONFIGS["llama-60m"],
            width=self.width,
            hidden=hidden,
            layers=self.layers,
            heads=self.heads,
            vocabulary=self.vocabulary,
        )

    def model(self, device: str) -> Llama:
        """Build the model with initial weights."""
        return init_weights(Llama(self.config()), 0).to(device)

    def tokens_on(self, device: str) -> Tensor:
        """Draw random tokens of shape (batch, length + 1)."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.vocabulary, (self.batch, self.length + 1), generator=generator).to(device)


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the cross entropy of the next tokens."""
    return cross_entropy(logits.flatten(0, -2).float(), tokens[:, 1:].flatten())


def autocast(device: str, dtype: torch.dtype) -> torch.autocast:
    """Return an autocast to `dtype` that is disabled for float32."""
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


def fused_adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Return torch's fused AdamW of the trainable parameters."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)


def module_step(
    model: nn.Module,
    size: StepSize,
    device: str,
    dtype: torch.dtype,
    *,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] = fused_adamw,
    **compile_options: Any,
) -> Callable:
    """Build a usual training step, with an optimizer that updates in place.

    It consists of `torch.compile` of the model, ``backward()`` and an update.
    """
    optimizer = make_optimizer(model)
    forward = torch.compile(model, fullgraph=True, dynamic=False, **compile_options) if compile_options else model
    tokens = size.tokens_on(device)

    def run() -> Tensor:
        with autocast(device, dtype):
            loss = loss_of(forward(tokens[:, :-1]), tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return run


def full_step(size: StepSize, device: str, dtype: torch.dtype = torch.float32, **options: Any) -> Callable:
    """Build a step that trains all weights."""
    return module_step(size.model(device), size, device, dtype, **options)


def peft_step(
    size: StepSize, rank: int, device: str, dtype: torch.dtype = torch.float32, **compile_options: Any
) -> Callable:
    """Build a step of PEFT's LoRA, which also trains embedding, norms and head."""
    import peft  # noqa: PLC0415 (slow to import, and only this step needs it)

    layers = ["query", "key", "value", "output", "gate", "up", "down"]
    config = peft.LoraConfig(r=rank, lora_alpha=1, target_modules=layers)
    model = peft.get_peft_model(size.model(device), config)
    for name, parameter in model.named_parameters():
        if "base_layer" not in name:
            parameter.requires_grad_()
    return module_step(model.get_base_model(), size, device, dtype, **compile_options)


def compile_blocks(model: nn.Module, **options: Any) -> nn.Module:
    """Compile each block of a model by itself, in place. Equal blocks share a graph."""
    for block in model.get_submodule("layers").children():
        block.compile(fullgraph=True, dynamic=False, **options)
    return model


class LibraryStep:
    """A training step of this library, with its state and schedule."""

    def __init__(
        self,
        size: StepSize,
        rank: int,
        device: str,
        dtype: torch.dtype = torch.float32,
        *,
        wrap: Callable[[nn.Module], nn.Module] | None = None,
        donate: bool = True,
        base: str | None = None,
        residual: str | None = "bfloat16",
        residual_device: str | None = None,
        optimizer: dl.optim.Transform | None = None,
        compensate: float = 0.0,
        targets: Sequence[str] = TARGETS,
        trained: Literal["both", "b"] = "both",
        **compile_options: Any,
    ):
        model = size.model(device)
        storage: dict[str, Any] = {"base": base, "residual": residual, "residual_device": residual_device}
        self.params = dl.init(model, rank=rank, seed=0, targets=targets, trained=trained, **storage)
        self.schedule = dl.schedules.switchlora(SCHEDULE_STEPS)
        optimizer = dl.optim.adamw() if optimizer is None else optimizer
        trainable, frozen = dl.partition(self.params)
        self.state = (trainable, frozen, optimizer.init(trainable))
        self.tokens, self.lr = size.tokens_on(device), torch.tensor(LR, device=device)
        model = wrap(model) if wrap else model

        def gradients(state: Any, tokens: Tensor) -> tuple[Any, Tensor]:
            trainable, frozen, _ = state

            def loss_fn(weights: Any) -> Tensor:
                with autocast(device, dtype):
                    params = weights if compensate else dl.combine(weights, frozen)
                    return loss_of(dl.call(model, params, tokens[:, :-1]), tokens)

            weights = dl.materialize(dl.combine(trainable, frozen)) if compensate else trainable
            loss, grads = dl.value_and_grad(loss_fn)(weights)
            return grads, loss

        def update(state: Any, grads: Any, lr: Tensor, plan: Any) -> tuple[Any, None]:
            trainable, frozen, opt_state = state
            if compensate:
                params, dense = dl.combine(trainable, frozen), grads
                grads = dl.optim.project_gradients(dense, params)
                trainable, frozen = dl.partition(dl.optim.compensate(params, dense, lr=lr * compensate))
            if plan is not None:
                params, _ = dl.switch(dl.combine(trainable, frozen), plan)
                opt_state = dl.project_optimizer_state(opt_state, plan)
                trainable, frozen = dl.partition(params)
            updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=lr)
            return (dl.apply_updates(trainable, updates), frozen, opt_state), None

        def step(state: Any, tokens: Tensor, lr: Tensor, plan: Any) -> tuple[Any, Tensor]:
            grads, loss = gradients(state, tokens)
            return update(state, grads, lr, plan)[0], loss

        self.gradients, self.update, self.pure_step = gradients, update, step
        self.step = dl.compile_step(step, donate=donate, **compile_options) if compile_options else step

    def run(self, plan: Any = None) -> Tensor:
        """Take one step and return its loss.

        With a plan, the step switches.
        """
        self.state, loss = self.step(self.state, self.tokens, self.lr, plan)
        return loss

    def first_plan(self) -> Any:
        """Return the plan of a step at the start of the schedule.

        The schedule switches most vectors there.
        """
        return self.schedule(int(self.schedule.interval), self.params)

    def switching_fraction(self) -> float:
        """Return the fraction of the steps of a run that switch anything.

        Weights of one shape switch in the same steps, so only one of each shape is counted.
        """
        by_shape = {str(param.shape): param for param in self.params.values() if isinstance(param, dl.LowRank)}
        return sum(self.schedule.switches(step, by_shape) > 0 for step in range(SCHEDULE_STEPS)) / SCHEDULE_STEPS
