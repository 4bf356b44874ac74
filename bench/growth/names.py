"""Rows of lookups by name, in models and files with many small weights."""

import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dynlora_fn as dl
from bench.growth.models import chain, scratch
from bench.growth.row import Contender, Row, at_most, grows_at_most

_WIDTH = 8


def model_of(count: int) -> nn.Module:
    return chain(count, _WIDTH)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@cache
def weights_file(count: int) -> Path:
    """Write the weights to a file and return its path."""
    file = scratch() / f"weights-{count}.safetensors"
    save_file(weights_of(model_of(count)), file)
    return file


@cache
def adapter_folder(count: int) -> Path:
    """Write an adapter of rank 1 as PEFT does, and return its folder."""
    folder = scratch() / f"adapter-{count}"
    folder.mkdir()
    shapes = {"A": (1, _WIDTH), "B": (_WIDTH, 1)}
    factors = {
        f"base_model.model.{layer}.lora_{side}.weight": torch.randn(shape)
        for layer in range(count)
        for side, shape in shapes.items()
    }
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [str(layer) for layer in range(count)]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def init(count: int, **arguments: Any) -> Contender:
    settings = {"rank": 1, "seed": 0, "targets": ["*.weight"], "start": "lora", **arguments}
    return Contender(partial(dl.init, model_of(count), **settings))


def init_from_dict(count: int) -> Contender:
    return init(count, weights=weights_of(model_of(count)))


def init_from_file(count: int) -> Contender:
    model = model_of(count)
    settings = {"rank": 1, "seed": 0, "targets": ["*.weight"], "start": "lora"}
    return Contender(lambda: dl.init(model, weights=dl.interop.open_weights(weights_file(count)), **settings))


def init_by_name(count: int) -> Contender:
    return init(count, targets=list(weights_of(model_of(count))))


def init_apart(count: int) -> Contender:
    return init(count, stack=False)


def read_all(count: int) -> Contender:
    file = weights_file(count)
    return Contender(lambda: dict(dl.interop.open_weights(file)))


def load_adapter(count: int) -> Contender:
    return Contender(partial(dl.interop.load_adapter, model_of(count), adapter_folder(count), seed=0))


def load_file_at_once(count: int) -> Contender:
    return Contender(partial(load_file, weights_file(count)))


_BY_NAME = {
    "init(weights=dict)": init_from_dict,
    "init from a file": init_from_file,
    "init, targets by name": init_by_name,
    "init(stack=False)": init_apart,
    "dict(open_weights(file))": read_all,
    "load_adapter": load_adapter,
}
ROWS = {
    "names": Row(
        f"weights of width {_WIDTH}, looked up by name",
        "weights",
        (500, 2000, 10_000),
        (4, 8),
        {**_BY_NAME, "safetensors' load_file": load_file_at_once},
        goals=(
            *(grows_at_most(1.1, name) for name in _BY_NAME),
            *(at_most(2, name) for name in _BY_NAME),
        ),
        rounds=3,
    )
}
