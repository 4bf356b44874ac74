"""Layouts of LoRA adapters of PEFT: one per kind of layer.

PEFT's weight is ``weight + alpha / rank * B @ A``, with ``alpha / sqrt(rank)`` for rslora. A is at the layer's input.
A `LowRank` has the same alpha, with rslora times ``sqrt(rank)``.
"""

import math
from typing import NamedTuple

from torch import Tensor, nn

from dynlora_fn._core._types import Factors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


class Pair(NamedTuple):
    """Factors of a change ``up @ down`` of a weight (out, in), or of the transposed weight of an embedding."""

    up: Tensor  # (out, rank)
    down: Tensor  # (rank, in)


def aliases_of(model: nn.Module) -> dict[str, list[str]]:
    """Return all names of each parameter, itself included."""
    named = dict(model.named_parameters(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for name, parameter in named.items():
        names.setdefault(id(parameter), []).append(name)
    return {name: names[id(parameter)] for name, parameter in named.items()}


def kind_of_layer(model: nn.Module, name: str) -> str:
    """Return the kind of a layer that PEFT has LoRA for. A "transposed" layer has a weight (in, out).

    Raises:
        ValueError: If PEFT has no LoRA for the layer.
    """
    prefix, _, leaf_name = name.rpartition(".")
    layer = model.get_submodule(prefix)
    if leaf_name == "weight":
        if isinstance(layer, nn.Linear):
            return "linear"
        if isinstance(layer, nn.Embedding):
            return "embedding"
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.groups == 1:
            return "convolution"
        if type(layer).__name__ == "Conv1D":
            return "transposed"
    kind = type(layer).__name__ + (" in groups" if getattr(layer, "groups", 1) > 1 else "")
    raise ValueError(
        f"`params` has a low-rank {name!r} of {kind}, for which PEFT has no LoRA; "
        "merge it with `materialize` or write the model with `save_merged`"
    )


def as_layer(model: nn.Module, name: str, pair: Pair, shape: tuple[int, ...]) -> Pair:
    """Return the factors of a parameter in the layout of PEFT for its layer."""
    up, down = pair
    kind = kind_of_layer(model, name)
    if kind in ("embedding", "transposed"):
        return Pair(down.mT, up.mT)
    return Pair(up, down.reshape(-1, *shape[1:])) if kind == "convolution" else pair


def factors_of(model: nn.Module, name: str, pair: Pair, shape: tuple[int, ...]) -> Factors:
    """Return the factors of a parameter from PEFT's.

    Raises:
        ValueError: If the factors do not fit the shape of the parameter.
    """
    up, down = pair
    if kind_of_layer(model, name) in ("embedding", "transposed"):
        up, down = down.mT, up.mT
    down = down.flatten(1)
    if (up.shape[0], down.shape[1]) != (shape[0], math.prod(shape[1:])):
        raise ValueError(
            f"the adapter has factors of {tuple(pair.up.shape)} and {tuple(pair.down.shape)} for {name!r} of {shape}; "
            "load it into the model that it was made for"
        )
    return Factors(b=up, a=down)
