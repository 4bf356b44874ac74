"""What would training take at sizes that no machine here has: memory of a GPU, bytes on the wire, time of a step.

Parameters, bases and optimizer states are built on the meta device by the library itself, so that bytes are counted by
the code that counts them in a run; activations are read from the graph of a step on two models of few layers, and
extrapolated. What that is worth is measured on small models, each in a process of its own.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import tyro
from torch import Tensor

import dynlora_fn as dl
from bench.common import Common, count_bytes, finish, start, table
from bench.memory import Memory, in_a_process_of_its_own
from bench.training import Ours, Size
from models.llama import TARGETS

GB = 1e9


class Model(NamedTuple):
    width: int
    hidden: int
    layers: int
    key_width: int  # of keys and values; less than the width where heads share them
    vocabulary: int
    rank: int


MODELS = {
    "1.3B": Model(2048, 5461, 24, 2048, 32_100, 512),  # the paper's
    "7B": Model(4096, 11008, 32, 4096, 32_000, 1024),
    "13B": Model(5120, 13824, 40, 5120, 32_000, 1280),
    "70B": Model(8192, 28672, 80, 1024, 32_000, 2048),
    "405B": Model(16384, 53248, 126, 1024, 128_256, 4096),
}
BASES = {"float32": (None, None), "bfloat16": ("bfloat16", "int8"), "int8": ("int8", "int8"), "nf4": ("nf4", None)}
_TRACED = Size(width=256, heads=4)  # activations are per token and width; its graph is traced
_WIDTH_AND_HIDDEN = 256 + 688


@dataclass(frozen=True)
class Scale(Common):
    gpus: int = 64
    tokens: int = 8192
    """On each GPU in a step."""
    flops: float = 4e14
    """That a GPU reaches, a second."""
    bandwidth: float = 5e10
    """Bytes a second that a GPU sends."""
    models: tuple[str, ...] = field(default_factory=lambda: tuple(MODELS))
    check: bool = True
    """Measure the memory model on small runs too."""


class Predicted(NamedTuple):
    """Of one GPU."""

    state: float  # bytes: weights, bases, moments
    gradients: float
    activations: float
    gathered: float  # of what is sharded, at once
    reduced: float  # bytes a step that all reduce
    wire: float  # bytes a step that it sends
    seconds_computing: float
    seconds_sending: float

    @property
    def memory(self) -> float:
        return self.state + self.gradients + self.activations + self.gathered


def shapes(model: Model) -> dict[str, Tensor]:
    """The weights, on the meta device."""
    width, hidden, narrow = model.width, model.hidden, model.key_width
    block = {
        "attention.query": (width, width),
        "attention.key": (narrow, width),
        "attention.value": (narrow, width),
        "attention.output": (width, width),
        "feed_forward.gate": (hidden, width),
        "feed_forward.up": (hidden, width),
        "feed_forward.down": (width, hidden),
        "attention_norm": (width,),
        "feed_forward_norm": (width,),
    }
    sizes = {f"layers.{at}.{name}.weight": size for at in range(model.layers) for name, size in block.items()}
    ends = {"embedding.weight": (model.vocabulary, width), "head.weight": (model.vocabulary, width)}
    return {name: torch.empty(size, device="meta") for name, size in {**sizes, **ends, "norm.weight": (width,)}.items()}


@cache
def params_of(model: Model, base: str | None) -> dict[str, Any]:
    """Ours on a base, or without one full-rank parameters."""
    if base is None:
        return dl.init(shapes(model), rank=model.rank, seed=0, targets=[])
    held, residual = BASES[base]
    narrow = min(model.rank, model.key_width)
    rank = {"*.key.weight": narrow, "*.value.weight": narrow, "*": model.rank}
    return dl.init(shapes(model), rank=rank, seed=0, targets=TARGETS, base=held, residual=residual)


def computing_flops(params: dict[str, Any], model: Model, tokens: int, *, is_full: bool) -> float:
    """Of a step with each block computed twice forward: linear layers as `explain` counts them, and the head.

    A step without `remat` has 3/4 of full rank's; attention's products of activations are left out for all alike.
    """
    costs = dl.explain(params, tokens=tokens).costs
    linear = sum((cost.full_flops if is_full else cost.flops) or 0 for cost in costs)
    forward = sum(2 * tokens * torch.Size(cost.shape).numel() for cost in costs if cost.rank)
    return linear + forward + 6 * tokens * model.vocabulary * model.width


def predict(
    config: Scale, model: Model, base: str | None, *, is_sharded: bool, shards_factors: bool = False
) -> Predicted:
    ours = params_of(model, base)
    low_rank = ours if base else params_of(model, "float32")
    trainable, frozen = dl.partition(ours)
    ring = (config.gpus - 1) / config.gpus
    moments, bases = count_bytes(dl.optim.adamw().init(trainable)), count_bytes(frozen)
    gradients = reduced = dl.parallel.wire_bytes(trainable).reduced
    state, gathered, sent = count_bytes(trainable) + moments + bases, 0.0, 2 * ring * reduced
    if is_sharded and base:
        state -= bases * ring
        codes = sum(_seen_bytes(param.base) for param in ours.values() if isinstance(param, dl.LowRank))
        gathered, sent = _largest(ours), sent + 3 * ring * codes  # forward, again for `remat`, and backward
        if shards_factors:
            factors = [leaf for leaf in trainable.values() if isinstance(leaf, dl.Factors)]
            held = count_bytes(factors)
            state, gradients = state - 3 * held * ring, gradients - held * ring  # two moments beside them
            reduced -= held
            # They are gathered three times too, their gradients scattered, and a switch sends its rows.
            sent += 2 * ring * held + ring * _switched(ours)
            gathered += max(count_bytes(leaf) // leaf.b.shape[:-2].numel() for leaf in factors)
    elif is_sharded:  # full rank: weights, gradients and moments in shards
        state, gradients = state / config.gpus, gradients / config.gpus
        gathered, sent = _block_bytes(model), 4 * ring * reduced  # the same three, and gradients are scattered
    flops = computing_flops(low_rank, model, config.tokens, is_full=base is None)
    return Predicted(
        state=state,
        gradients=gradients,
        activations=activations(model, config.tokens),
        gathered=gathered,
        reduced=reduced,
        wire=sent,
        seconds_computing=flops / config.flops,
        seconds_sending=sent / config.bandwidth,
    )


def _switched(params: dict[str, Any]) -> int:
    """Rows of `a` in a step that switches, at the start of a run."""
    plan = dl.schedules.switchlora(40_000)(0, params)
    vectors = {name: own.b.slots.shape[-1] + own.a.slots.shape[-1] for name, own in plan.items()}
    return sum(count * 4 * params[name].factors.a[..., 0, :].numel() for name, count in vectors.items())


def _seen_bytes(base: Any) -> int:
    return count_bytes(base.codes if isinstance(base, dl.bases.Quantized) else base)


def _largest(params: dict[str, Any]) -> int:
    """One weight as it is stored, gathered."""
    low_rank = [param for param in params.values() if isinstance(param, dl.LowRank)]
    return max(_seen_bytes(param.base) // param.shape[:-2].numel() for param in low_rank)


def _block_bytes(model: Model) -> int:
    return count_bytes([leaf for name, leaf in shapes(model).items() if name.startswith("layers.0.")])


def activations(model: Model, tokens: int) -> float:
    """In float32 with `remat` of each block: the inputs of all blocks, and what one of them keeps.

    Read from the graph at a small width: what a block keeps grows with its width and hidden width and the tokens.
    """
    one, two = (traced_peak(layers) for layers in (1, 2))
    inside = (2 * one - two) / (_TRACED.tokens * _WIDTH_AND_HIDDEN)
    each = 4 * model.width * tokens * model.layers
    logits = 4 * 2 * tokens * (model.vocabulary - _TRACED.vocabulary)
    return each + inside * tokens * (model.width + model.hidden) + logits


@cache
def traced_peak(layers: int) -> int:
    """Of forward and backward pass with `remat`, less the gradients."""
    size = Size(width=_TRACED.width, heads=_TRACED.heads, layers=layers)
    ours = Ours(size, size.width // 4, "cpu", wrap=lambda model: dl.remat(model, ["layers.*"]))
    return dl.peak_memory(ours.gradients, ours.state, ours.tokens).step - count_bytes(ours.state[0])


def shares() -> dict[str, float]:
    """The paper's figures at 1.3B: trainable numbers, and bytes reduced over full-rank data parallelism's."""
    model = MODELS["1.3B"]
    whole = dl.parallel.wire_bytes(dl.partition(params_of(model, None)).trainable).reduced
    own = {rank: params_of(model._replace(rank=rank), "float32") for rank in (256, 512)}
    reduced = {rank: dl.parallel.wire_bytes(dl.partition(params).trainable).reduced for rank, params in own.items()}
    return {
        "full_rank_parameters": whole / 4,
        **{f"trainable_at_{rank}": one / 4 for rank, one in reduced.items()},
        "reduced_over_full_rank": reduced[512] / whole,
    }


# --- against what is measured


def checked(config: Scale) -> dict[str, dict[str, float]]:
    """Peak beyond the state of compiled steps on small models, measured and predicted."""
    found = {}
    for name, base, kind in (("float32", None, "static"), ("int8", "int8", "static"), ("remat", None, "remat")):
        memory = Memory(quick=config.quick, threads=config.threads, layers=4, base=base, device=config.device)
        found[name] = in_a_process_of_its_own(memory, 64 if config.quick else 256, kind)
    return found


def methods(config: Scale, model: Model) -> dict[str, Callable[[], Predicted]]:
    """Full rank and ours, replicated and sharded. nf4 holds no odd rows."""
    bases = [base for base in BASES if base != "nf4" or model.hidden % 2 == 0]
    made = {"full rank": partial(predict, config, model, None, is_sharded=False)}
    made["full rank, FSDP"] = partial(predict, config, model, None, is_sharded=True)
    for base in bases:
        made[base] = partial(predict, config, model, base, is_sharded=False)
        if base == "nf4" and not _divides(model, config.gpus):
            continue
        made[f"{base}, sharded"] = partial(predict, config, model, base, is_sharded=True)
        made[f"{base}, factors too"] = partial(predict, config, model, base, is_sharded=True, shards_factors=True)
    return made


def _divides(model: Model, gpus: int) -> bool:
    """Whether nf4's runs of numbers that share a factor divide the rows of each process."""
    block = [leaf.shape for name, leaf in shapes(model).items() if name.startswith("layers.0.")]
    return all(rows % gpus == 0 and rows // gpus * columns % 2**14 == 0 for rows, *rest in block for columns in rest)


def main(config: Scale) -> None:
    if config.quick:
        config = Scale(**{**vars(config), "models": ("1.3B",), "check": False})
    console = start(config)
    results: dict[str, Any] = shares()
    raw: dict[str, Any] = {}
    for name in config.models:
        predicted = {method: make() for method, make in methods(config, MODELS[name]).items()}
        raw[name] = {method: {**one._asdict(), "memory": one.memory} for method, one in predicted.items()}
        rows = [
            [method, one.memory / GB, one.state / GB, one.activations / GB, one.reduced / GB, one.wire / GB,
             one.seconds_computing, one.seconds_sending]
            for method, one in predicted.items()
        ]  # fmt: skip
        columns = ["on each GPU", "GB", "state", "activations", "reduced GB", "sent GB", "s computing", "s sending"]
        console.print(table(f"{name}, rank {MODELS[name].rank}, {config.gpus} GPUs", columns, rows))
    if config.check:
        raw["checked"] = checked(config)
        results["predicted_over_measured"] = {
            name: one["predicted"] / one["measured"] for name, one in raw["checked"].items()
        }
    console.print(json.dumps(results, indent=1))
    finish(config, results, raw)


if __name__ == "__main__":
    main(tyro.cli(Scale))
