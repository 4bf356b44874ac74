"""Layouts of LoRA adapters of PEFT: one per kind of layer.

PEFT's weight is ``weight + alpha / rank * B @ A``, with ``alpha / sqrt(rank)`` for rslora. A is at the layer's input.
A `LowRank` has the same alpha, or ``sqrt(rank)`` times the alpha for rslora.

=====================  ====================  ==========================  ====================================
kind                   the parameter         A in a file                 B in a file
=====================  ====================  ==========================  ====================================
"linear"               (out, in)             (rank, in)                  (out, rank)
"transposed"           (in, out)             (rank, in)                  (out, rank)
"embedding"            (count, size)         (rank, count)               (size, rank)
"convolution"          (out, in, *kernel)    (rank, in, *kernel)         (out, rank, 1, ...)
"experts"              (stack, out, in)      (stack * rank, in)          (out, rank * stack), an expert innermost
"transposed experts"   (stack, in, out)      (stack * rank, in)          (out, rank * stack), an expert innermost
=====================  ====================  ==========================  ====================================
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dynlora_fn._core._types import Factors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


class Pair(NamedTuple):
    """Factors of a change ``up @ down`` of a weight (out, in).

    For an embedding, the weight is the transposed parameter.
    """

    up: Tensor  # (out, rank)
    down: Tensor  # (rank, in)


class PairShapes(NamedTuple):
    """The shapes of the factors of one layer in a file."""

    up: tuple[int, ...]
    down: tuple[int, ...]


def aliases_of(model: nn.Module, *, with_buffers: bool = False) -> dict[str, list[str]]:
    """Return all names of each parameter, by each of its names.

    With `with_buffers`, return the names of buffers too.
    """
    named = dict[str, Tensor](model.named_parameters(remove_duplicate=False))
    named |= dict(model.named_buffers(remove_duplicate=False)) if with_buffers else {}
    names: dict[int, list[str]] = {}
    for name, tensor in named.items():
        names.setdefault(id(tensor), []).append(name)
    return {name: names[id(tensor)] for name, tensor in named.items()}


def kind_of_layer(
    model: nn.Module,
    name: str,
    *,
    owner: str = "`params`",
    instead: str = "merge it with `materialize` or write the model with `save_merged`",
) -> str:
    """Return the kind of a layer that PEFT has LoRA for.

    A "transposed" layer has a weight (in, out).

    Args:
        model: The model.
        name: The name of the weight of the layer.
        owner: What has the low-rank weight, as the error message begins.
        instead: What to do instead, as the error message ends.

    Raises:
        ValueError: If PEFT has no LoRA for the layer.
    """
    return kind_of_module(model.get_submodule(name.rpartition(".")[0]), name, owner=owner, instead=instead)


def kind_of_module(layer: nn.Module, name: str, *, owner: str, instead: str) -> str:
    """Return the kind of a layer as `kind_of_layer` does, from the module itself."""
    leaf_name = name.rpartition(".")[2]
    if leaf_name == "weight":
        if isinstance(layer, nn.Linear):
            return "linear"
        if isinstance(layer, nn.Embedding):
            return "embedding"
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.groups == 1:
            return "convolution"
        if (type(layer).__name__, type(layer).__module__) == ("Conv1D", "transformers.pytorch_utils"):
            return "transposed"
    kind = type(layer).__name__ + (" in groups" if getattr(layer, "groups", 1) > 1 else "")
    raise ValueError(f"{owner} has a low-rank {name!r} of {kind}, for which PEFT has no LoRA; {instead}")


def kind_of_parameter(model: nn.Module, name: str, *, owner: str, instead: str) -> str:
    """Return the kind of a parameter that PEFT adapts by its name.

    Raises:
        ValueError: If PEFT has no LoRA for a parameter of this shape.
    """
    shape = tuple(model.get_parameter(name).shape)
    if len(shape) == 2:
        return "linear"
    is_turned = is_transposed(model, name)
    if len(shape) == 3 and not (is_turned and shape[0] == 1):  # PEFT transposes a single expert wrongly
        return "transposed experts" if is_turned else "experts"
    raise ValueError(f"{owner} has a low-rank {name!r} of shape {shape}, for which PEFT has no LoRA; {instead}")


def is_transposed(model: nn.Module, name: str) -> bool:
    """Return whether the experts of a module are stored as (stack, in, out)."""
    return bool(getattr(model.get_submodule(name.rpartition(".")[0]), "is_transposed", False))


def shapes_in_file(kind: str, shape: tuple[int, ...], rank: int) -> PairShapes:
    """Return the shapes of B and A in a file, for a parameter of a kind and shape."""
    if kind == "convolution":
        return PairShapes((shape[0], rank, *(1 for _ in shape[2:])), (rank, *shape[1:]))
    if kind in ("experts", "transposed experts"):
        rank *= shape[0]
    rows, columns = shape[-2:] if kind in ("linear", "experts") else shape[:-3:-1]
    return PairShapes((rows, rank), (rank, columns))


def as_layer(model: nn.Module, name: str, pair: Pair, shape: tuple[int, ...]) -> Pair:
    """Return the factors of a parameter in the layout of PEFT for its layer."""
    up, down = pair
    kind = kind_of_layer(model, name)
    if kind in ("embedding", "transposed"):
        return Pair(down.mT, up.mT)
    return Pair(up, down.reshape(-1, *shape[1:])) if kind == "convolution" else pair


def factors_of(kind: str, pair: Pair, shape: tuple[int, ...]) -> Factors:
    """Return the factors of a parameter from PEFT's factors.

    A rank above min(out, in) is cut to min(out, in). The product does not change.
    """
    up, down = (pair.up.flatten(1), pair.down.flatten(1)) if kind == "convolution" else pair
    if kind in ("experts", "transposed experts"):
        up = up.reshape(len(up), -1, shape[0]).movedim(-1, 0)
        down = down.reshape(shape[0], -1, down.shape[-1])
    if kind in ("embedding", "transposed", "transposed experts"):
        up, down = down.mT, up.mT
    return Factors(*_cut(up, down))


def _cut(up: Tensor, down: Tensor) -> Pair:
    """Return factors of at most rank min(out, in) with the same product.

    With ``up.mT = Q @ R`` and orthonormal columns of Q, in float64, and in the same way for `down`::

        up @ down = R.mT @ (Q.mT @ down)
    """
    rows, columns = up.shape[-2], down.shape[-1]
    if up.shape[-1] <= min(rows, columns):
        return Pair(up, down)
    wide_up, wide_down = up.double(), down.double()
    if rows <= columns:
        q, r = torch.linalg.qr(wide_up.mT)
        return Pair(r.mT.to(up.dtype), (q.mT @ wide_down).to(down.dtype))
    q, r = torch.linalg.qr(wide_down)
    return Pair((wide_up @ q).to(up.dtype), r.to(down.dtype))
