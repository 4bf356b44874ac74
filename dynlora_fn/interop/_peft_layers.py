"""LoRA adapters of PEFT: what a layer's factors are called, and how they lie.

PEFT's weight is ``weight + alpha / rank * B @ A`` (``alpha / sqrt(rank)`` with rslora), with A at the layer's input.
The scale here is always ``1 / rank``, and so whatever differs is multiplied into `b`.
"""

import math
from typing import NamedTuple

from torch import Tensor, nn

from dynlora_fn._core._types import Factors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


class Pair(NamedTuple):
    """``up @ down`` is added to a weight as its layer has it, (out, in), or (rows of an embedding's weight).T."""

    up: Tensor  # (out, rank)
    down: Tensor  # (rank, in)


def aliases_of(model: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter."""
    named = dict(model.named_parameters(remove_duplicate=False))
    return {name: [other for other in named if named[other] is named[name]] for name in named}


def kind_of_layer(model: nn.Module, name: str) -> str:
    """Of a layer that PEFT adapts, by what it is; "transposed" has its weight as (in, out)."""
    prefix, _, own = name.rpartition(".")
    layer = model.get_submodule(prefix)
    if own == "weight":
        if isinstance(layer, nn.Linear):
            return "linear"
        if isinstance(layer, nn.Embedding):
            return "embedding"
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.groups == 1:
            return "convolution"
        if type(layer).__name__ == "Conv1D":
            return "transposed"
    got = f"{name!r} of {type(layer).__name__}" + (" in groups" if getattr(layer, "groups", 1) > 1 else "")
    raise ValueError(f"`params` must be of layers that PEFT has LoRA for, got {got}")


def as_layer(model: nn.Module, name: str, pair: Pair, shape: tuple[int, ...]) -> Pair:
    """The factors of a parameter as PEFT has them for its layer."""
    up, down = pair
    kind = kind_of_layer(model, name)
    if kind in ("embedding", "transposed"):
        return Pair(down.mT, up.mT)
    return Pair(up, down.reshape(-1, *shape[1:])) if kind == "convolution" else pair


def factors_of(model: nn.Module, name: str, pair: Pair, shape: tuple[int, ...]) -> Factors:
    """The way back, with the scale, which `pair` has in it, out of `b`."""
    up, down = pair
    if kind_of_layer(model, name) in ("embedding", "transposed"):
        up, down = down.mT, up.mT
    down = down.flatten(1)
    if (up.shape[0], down.shape[1]) != (shape[0], math.prod(shape[1:])):
        got = f"{name!r} with factors of {tuple(pair.up.shape)} and {tuple(pair.down.shape)} for {shape}"
        raise ValueError(f"the adapter must fit the model, got {got}")
    return Factors(b=up * down.shape[0], a=down)
