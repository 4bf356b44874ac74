"""Predict memory, bytes sent and time of a step on many GPUs.

Parameters, bases and optimizer states are built with the library on the meta device, so their bytes are exact.
Activations are extrapolated from the graphs of two small models.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import dynlora_fn as dl
from bench.support.process_memory import count_bytes
from bench.support.training_steps import SCHEDULE_STEPS, LibraryStep, StepSize
from dynlora_fn.bases._base import as_base
from models.llama import TARGETS


class Model(NamedTuple):
    """The shapes of a llama, and the rank of its factors."""

    width: int
    hidden: int
    layers: int
    key_width: int  # width of keys and values, which is less than `width` if heads share them
    vocabulary: int
    rank: int


MODELS = {
    "1.3B": Model(2048, 5461, 24, 2048, 32_100, 512),  # the model of the paper
    "7B": Model(4096, 11008, 32, 4096, 32_000, 1024),
    "13B": Model(5120, 13824, 40, 5120, 32_000, 1280),
    "70B": Model(8192, 28672, 80, 1024, 32_000, 2048),
    "405B": Model(16384, 53248, 126, 1024, 128_256, 4096),
}
BASES = {"float32": (None, None), "bfloat16": ("bfloat16", "int8"), "int8": ("int8", "int8"), "nf4": ("nf4", None)}
_TRACED = StepSize(width=256, heads=4)  # the graph of this step gives activations per token and width
_WIDTH_AND_HIDDEN = 256 + 688


class Cluster(NamedTuple):
    """The number of GPUs, the tokens of a step, and the speed of each GPU."""

    gpus: int
    tokens: int  # tokens of each GPU in a step
    flops: float  # FLOP/s that a GPU reaches
    bandwidth: float  # bytes that a GPU sends per second


class Predicted(NamedTuple):
    """The bytes and times of one GPU in a step."""

    state: float  # bytes of weights, bases and moments
    gradients: float
    activations: float
    gathered: float  # bytes of the largest all-gathered tensor
    reduced: float  # bytes of the gradients that are reduced in a step
    wire: float  # bytes that a GPU sends in a step
    seconds_computing: float
    seconds_sending: float

    @property
    def memory(self) -> float:
        """The bytes in memory."""
        return self.state + self.gradients + self.activations + self.gathered


def shapes(model: Model) -> dict[str, Tensor]:
    """Build the weights on the meta device."""
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
    """Build low-rank parameters on a base, or full-rank parameters if it is None."""
    if base is None:
        return dl.init(shapes(model), rank=model.rank, seed=0, targets=[])
    storage, residual = BASES[base]
    narrow = min(model.rank, model.key_width)
    rank = {"*.key.weight": narrow, "*.value.weight": narrow, "*": model.rank}
    return dl.init(shapes(model), rank=rank, seed=0, targets=TARGETS, base=storage, residual=residual)


def computing_flops(params: dict[str, Any], model: Model, tokens: int, *, is_full: bool) -> float:
    """Return the FLOPs of a step that computes the forward pass of each block twice.

    Linear layers are counted with `explain`, and the head is added. The products of activations in attention are left
    out for every method. At full rank, a step without `remat` has 3/4 of these FLOPs.
    """
    costs = dl.explain(params, tokens=tokens).costs
    linear = sum((cost.full_flops if is_full else cost.flops) or 0 for cost in costs)
    forward = sum(2 * tokens * torch.Size(cost.shape).numel() for cost in costs if cost.rank)
    return linear + forward + 6 * tokens * model.vocabulary * model.width


def predict(
    cluster: Cluster, model: Model, base: str | None, *, is_sharded: bool, shards_factors: bool = False
) -> Predicted:
    """Predict the bytes and times of one GPU.

    `base` None means full rank.
    """
    params = params_of(model, base)
    low_rank = params if base else params_of(model, "float32")
    trainable, frozen = dl.partition(params)
    ring = (cluster.gpus - 1) / cluster.gpus
    moments, bases = count_bytes(dl.optim.adamw().init(trainable)), count_bytes(frozen)
    gradients = reduced = dl.parallel.wire_bytes(trainable).reduced
    state, gathered, sent = count_bytes(trainable) + moments + bases, 0.0, 2 * ring * reduced
    if is_sharded and base:
        state -= bases * ring
        codes = sum(_gathered_bytes(param.base) for param in params.values() if isinstance(param, dl.LowRank))
        gathered, sent = _largest(params), sent + 3 * ring * codes  # for forward, recomputation and backward
        if shards_factors:
            factors = [leaf for leaf in trainable.values() if isinstance(leaf, dl.Factors)]
            factor_bytes = count_bytes(factors)
            state -= 3 * factor_bytes * ring  # factors and two moments
            gradients -= factor_bytes * ring
            reduced -= factor_bytes
            # Factors are all-gathered three times, their gradients are reduce-scattered, and switched rows are sent.
            sent += 2 * ring * factor_bytes + ring * _switched(params)
            gathered += max(count_bytes(leaf) // leaf.b.shape[:-2].numel() for leaf in factors)
    elif is_sharded:  # full rank: weights, gradients and moments in shards
        state, gradients = state / cluster.gpus, gradients / cluster.gpus
        gathered, sent = _block_bytes(model), 4 * ring * reduced  # three all-gathers and one reduce-scatter
    flops = computing_flops(low_rank, model, cluster.tokens, is_full=base is None)
    return Predicted(
        state=state,
        gradients=gradients,
        activations=activations(model, cluster.tokens),
        gathered=gathered,
        reduced=reduced,
        wire=sent,
        seconds_computing=flops / cluster.flops,
        seconds_sending=sent / cluster.bandwidth,
    )


def _switched(params: dict[str, Any]) -> int:
    """Return the bytes of the rows of `a` that a switch at the start of a run sends."""
    plans = dl.schedules.switchlora(SCHEDULE_STEPS)(0, params)
    vectors = {name: plan.b.slots.shape[-1] + plan.a.slots.shape[-1] for name, plan in plans.items()}
    return sum(count * 4 * params[name].factors.a[..., 0, :].numel() for name, count in vectors.items())


def _gathered_bytes(base: Any) -> int:
    """Return the bytes of a base without its residual, which is not all-gathered."""
    return count_bytes(as_base(base).flatten().tensors)


def _largest(params: dict[str, Any]) -> int:
    """Return the bytes of the largest single weight in its storage format."""
    low_rank = [param for param in params.values() if isinstance(param, dl.LowRank)]
    return max(_gathered_bytes(param.base) // param.shape[:-2].numel() for param in low_rank)


def _block_bytes(model: Model) -> int:
    return count_bytes([leaf for name, leaf in shapes(model).items() if name.startswith("layers.0.")])


def activations(model: Model, tokens: int) -> float:
    """Return the bytes of activations in float32 with `remat` of each block.

    They are the inputs of all blocks, and the activations inside one block. The activations inside a block are
    proportional to the number of tokens, and to width plus hidden width. They are scaled from a small model.
    """
    one_layer, two_layers = (traced_peak(layers) for layers in (1, 2))
    block = (2 * one_layer - two_layers) / (_TRACED.tokens * _WIDTH_AND_HIDDEN)
    inputs = 4 * model.width * tokens * model.layers
    logits = 4 * 2 * tokens * (model.vocabulary - _TRACED.vocabulary)
    return inputs + block * tokens * (model.width + model.hidden) + logits


@cache
def traced_peak(layers: int) -> int:
    """Return the peak of forward and backward pass with `remat`, minus the gradients."""
    size = StepSize(width=_TRACED.width, heads=_TRACED.heads, layers=layers)
    step = LibraryStep(size, size.width // 4, "cpu", wrap=lambda model: dl.remat(model, ["layers.*"]))
    return dl.peak_memory(step.gradients, step.state, step.tokens).step - count_bytes(step.state[0])


def predictions(cluster: Cluster, model: Model) -> dict[str, Callable[[], Predicted]]:
    """Return a function for each method, replicated and sharded, that predicts it.

    nf4 is left out for models with an odd number of rows, which it cannot store.
    """
    bases = [base for base in BASES if base != "nf4" or model.hidden % 2 == 0]
    result = {"full rank": partial(predict, cluster, model, None, is_sharded=False)}
    result["full rank, FSDP"] = partial(predict, cluster, model, None, is_sharded=True)
    for base in bases:
        result[base] = partial(predict, cluster, model, base, is_sharded=False)
        if base == "nf4" and not _divides(model, cluster.gpus):
            continue
        result[f"{base}, sharded"] = partial(predict, cluster, model, base, is_sharded=True)
        result[f"{base}, factors too"] = partial(predict, cluster, model, base, is_sharded=True, shards_factors=True)
    return result


def _divides(model: Model, gpus: int) -> bool:
    """Return whether the shard of each process consists of complete blocks of nf4.

    The entries of a block have a common scale.
    """
    block = [leaf.shape for name, leaf in shapes(model).items() if name.startswith("layers.0.")]
    return all(rows % gpus == 0 and rows // gpus * columns % 2**14 == 0 for rows, *rest in block for columns in rest)
