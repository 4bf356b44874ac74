"""The models of the rows: llamas, chains of linear layers, and both in PEFT."""

import atexit
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dynlora_fn as dl
from bench.support.process_memory import count_bytes
from models.llama import CONFIGS, Llama, LlamaConfig, init_weights

LAYERS = ["query", "key", "value", "output", "gate", "up", "down"]
WIDTH = 64  # width of the layers of a chain
LLAMAS = {  # configurations by millions of parameters
    1: replace(CONFIGS["llama-9m"], vocabulary=1024),
    2: replace(CONFIGS["llama-9m"], vocabulary=1024, layers=8),
    8: replace(CONFIGS["llama-20m"], vocabulary=4096, layers=8),
    35: replace(CONFIGS["llama-60m"], vocabulary=10_000),
    100: CONFIGS["llama-100m"],
    290: replace(CONFIGS["llama-350m"], vocabulary=18_000, layers=20),
    1090: replace(CONFIGS["llama-1b"], vocabulary=20_000, layers=20),
}


@lru_cache(maxsize=1)
def llama(millions: int, dtype: torch.dtype = torch.float32) -> Llama:
    """Build a llama of this size with random weights.

    The cache keeps the last llama for further contenders.
    """
    return init_weights(Llama(LLAMAS[millions]).to(dtype), 0)


def meta_llama(config: LlamaConfig, dtype: torch.dtype = torch.float32) -> Llama:
    """Build a llama on the meta device."""
    with torch.device("meta"):
        return Llama(config).to(dtype)


def model_bytes(millions: int, dtype: torch.dtype = torch.float32) -> int:
    """Return the bytes of the parameters of a llama."""
    return count_bytes(dict(meta_llama(LLAMAS[millions], dtype).named_parameters()))


def largest_bytes(millions: int) -> int:
    """Return the bytes of the largest stack or other parameter in float32."""
    params = dl.init(meta_llama(LLAMAS[millions]), rank=1, seed=0, targets=[])
    return max(count_bytes(param) for param in params.values())


def fresh(model: Llama) -> Llama:
    """Return new modules with the same tensors.

    PEFT replaces modules, so it must not get the modules that other contenders use.
    """
    copy = meta_llama(model.config)
    copy.load_state_dict(model.state_dict(), assign=True)
    return copy


def in_peft(model: nn.Module, rank: int, layers: Sequence[str] | str = LAYERS) -> Any:
    """Return PEFT's model with LoRA.

    PEFT replaces the layers in `model`.
    """
    import peft  # noqa: PLC0415 (slow to import)

    layers = layers if isinstance(layers, str) else list(layers)
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=1, target_modules=layers))


def chain(count: int, width: int = WIDTH) -> nn.Sequential:
    """Build a chain of linear layers.

    Their weights are orthogonal, so that the norm of the activations is the same after any number of layers.
    """
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count)))
    for layer in model:
        nn.init.orthogonal_(layer.weight)
    return model


@cache
def scratch() -> Path:
    """Return a folder that is deleted when the process ends."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return Path(folder.name)
