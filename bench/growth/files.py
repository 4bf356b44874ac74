"""Rows of files: adapters, merged models and checkpoints."""

import hashlib
import json
import os
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dynlora_fn as dl
from bench.growth.models import fresh, in_peft, largest_bytes, llama, model_bytes, scratch
from bench.growth.row import Contender, Goal, Row, at_most_times, needs_at_most
from models.llama import TARGETS
from models.pretrain.checkpoint import Saver
from models.pretrain.processes import SINGLE_PROCESS

_RANK = 8
_TENSORS = 16  # number of tensors of a state
_MB = 10**6


# --- adapters of a change with a slowly falling spectrum, which is the hardest to approximate
def change_of(width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(width, width, generator=generator) * torch.arange(1, width + 1).rsqrt()


def changed_model(width: int) -> tuple[nn.Module, dict[str, Any], dict[str, Tensor]]:
    """Return a model, parameters that differ by `change_of`, and the model's weights."""
    model = nn.Sequential(nn.Linear(width, width, bias=False))
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {name: tensor + change_of(width) for name, tensor in original.items()}
    params = dl.init(model, weights=weights, rank=_RANK, seed=0, targets=["*.weight"])
    return model, params, original


def save_adapter(width: int) -> Contender:
    model, params, original = changed_model(width)
    save = partial(dl.interop.save_adapter, model, params, scratch() / "adapter")
    return Contender(partial(save, original=original, rank=_RANK))


def svd_lowrank(width: int) -> Contender:
    return Contender(partial(torch.svd_lowrank, change_of(width), q=_RANK))


def adapter_error(width: int) -> Contender:
    """Measure the error of the adapter in its file over the error of the best one."""
    contender = save_adapter(width)

    def error() -> float:
        contender.run()
        folder = scratch() / "adapter"
        config = json.loads((folder / "adapter_config.json").read_text())
        sides = {key.rpartition("lora_")[2][0]: tensor for key, tensor in load_file(folder / ADAPTER).items()}
        adapter = sides["B"].double() @ sides["A"].double() * config["lora_alpha"] / config["r"]
        change = change_of(width).double()
        best = torch.linalg.svdvals(change)[_RANK:].norm()
        return ((adapter - change).norm() / best).item()

    return Contender(error)


ADAPTER = "adapter_model.safetensors"


# --- whole models
def save_merged(millions: int) -> Contender:
    model = llama(millions)
    params = dl.init(model, rank=_RANK, seed=0, targets=TARGETS)
    return Contender(partial(dl.interop.save_merged, model, params, scratch() / "merged"))


def save_dense(millions: int) -> Contender:
    """Save the same dense weights with safetensors' `save_file`."""
    model = llama(millions)
    params = dl.init(model, rank=_RANK, seed=0, targets=TARGETS)
    return Contender(lambda: save_file(dl.state_dict(model, params), scratch() / "dense.safetensors"))


def peft_save_merged(millions: int) -> Contender:
    model = llama(millions)

    def run(adapted: Any) -> None:
        save_file(adapted.merge_and_unload().state_dict(), scratch() / "peft.safetensors")

    return Contender(run, lambda: (in_peft(fresh(model), _RANK),))


def peft_folder(millions: int) -> Path:
    """Return the folder of an adapter that PEFT saved."""
    folder = scratch() / f"peft-{millions}"
    if not folder.exists():
        in_peft(fresh(llama(millions)), _RANK).save_pretrained(folder)
    return folder


def load_adapter(millions: int) -> Contender:
    return Contender(partial(dl.interop.load_adapter, llama(millions), peft_folder(millions), seed=0))


def load_and_copy(millions: int) -> Contender:
    """Measure loading the adapter with safetensors and copying the model's weights.

    `load_adapter` copies the weights too, because they become the bases.
    """
    model, file = llama(millions), peft_folder(millions) / ADAPTER
    return Contender(lambda: (load_file(file), [parameter.detach().clone() for parameter in model.parameters()]))


def peft_load(millions: int) -> Contender:
    import peft  # noqa: PLC0415 (slow to import)

    model, folder = llama(millions), peft_folder(millions)
    return Contender(lambda copy: peft.PeftModel.from_pretrained(copy, folder), lambda: (fresh(model),))


# --- checkpoints of a state of some MB
@lru_cache(maxsize=1)
def state_of(megabytes: int) -> dict[str, Tensor]:
    """Return a state, the same one for all contenders.

    Several states would leave too little memory for cached files.
    """
    return {f"tensor-{index}": torch.randn(megabytes * _MB // 4 // _TENSORS) for index in range(_TENSORS)}


def folder_of(megabytes: int) -> Path:
    """Return the folder of the checkpoints of a state, which exists."""
    folder = scratch() / f"checkpoints-{megabytes}"
    folder.mkdir(exist_ok=True)
    return folder


def save_checkpoint(megabytes: int) -> Contender:
    save = partial(dl.interop.save_checkpoint, state_of(megabytes), folder_of(megabytes), step=1, keep=1)
    return Contender(save)


def save_in_background(megabytes: int) -> Contender:
    """Measure what `models.pretrain` does.

    It copies the state first, because training continues meanwhile.
    """
    state, folder = state_of(megabytes), folder_of(megabytes)

    def run() -> None:
        with Saver(folder, SINGLE_PROCESS, keep=1) as saver:
            saver.start(1, state)

    return Contender(run)


def load_state(megabytes: int, *, donate: bool = False) -> Contender:
    save_checkpoint(megabytes).run()
    template = {name: tensor.clone() for name, tensor in state_of(megabytes).items()}
    return Contender(partial(dl.interop.load_checkpoint, folder_of(megabytes), template, donate=donate))


def synced(file: Path) -> None:
    """Wait until a file is on the disk."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def safetensors_save(megabytes: int) -> Contender:
    """Measure safetensors with the same guarantees.

    A new file replaces the old one once it is on the disk, and its sum is computed.
    """
    state, file = state_of(megabytes), scratch() / f"state-{megabytes}.safetensors"
    new = file.with_suffix(".new")
    return Contender(lambda: (save_file(state, new), synced(new), digest(new), new.replace(file)))


def safetensors_load(megabytes: int) -> Contender:
    """Measure a sum and `load_file`, which maps the file and reads nothing."""
    safetensors_save(megabytes).run()
    file = scratch() / f"state-{megabytes}.safetensors"
    return Contender(lambda: (digest(file), load_file(file)))


def safetensors_read(megabytes: int) -> Contender:
    """Measure a sum, `load_file`, and a copy, which reads the mapped file into memory."""
    safetensors_save(megabytes).run()
    file = scratch() / f"state-{megabytes}.safetensors"
    return Contender(lambda: (digest(file), [tensor.clone() for tensor in load_file(file).values()]))


def torch_save(megabytes: int) -> Contender:
    state, file = state_of(megabytes), scratch() / f"state-{megabytes}.pt"
    return Contender(lambda: (torch.save(state, file), synced(file)))


def torch_load(megabytes: int) -> Contender:
    torch_save(megabytes).run()
    return Contender(partial(torch.load, scratch() / f"state-{megabytes}.pt"))


_MERGED = {
    "save_merged": save_merged,
    "state_dict and save_file": save_dense,
    "PEFT's merge_and_unload, save_file": peft_save_merged,
    "load_adapter": load_adapter,
    "load_file and a copy": load_and_copy,
    "PEFT's from_pretrained": peft_load,
}
_CHECKPOINTS = {
    "save": save_checkpoint,
    "copy, save in the background": save_in_background,
    "save_file, fsync, sum": safetensors_save,
    "torch.save, fsync": torch_save,
    "load": load_state,
    "load, donate": partial(load_state, donate=True),
    "sum, load_file, copy": safetensors_read,
    "sum, load_file": safetensors_load,
    "torch.load": torch_load,
}
_LLAMAS, _SMALL = (8, 35, 100), (1, 2)
_STATES, _SMALL_STATES = (64, 256, 1024), (1, 2)


def state_needs_at_most(most: float, name: str, *, copies: int = 0) -> Goal:
    """Return a goal for the peak of a checkpoint, in bytes of the state.

    `copies` of the state are not counted. Saving in the background needs one, because training continues meanwhile.
    """
    return needs_at_most(most, name, lambda n: n * _MB, lambda n: n * _MB * (copies + 1 / _TENSORS))


ROWS = {
    "adapter": Row(
        f"adapter of rank {_RANK} of the change of one weight",
        "width",
        (512, 1024, 2048),
        (32, 64),
        {"save_adapter": save_adapter, "svd_lowrank": svd_lowrank},
        goals=(at_most_times(10, "save_adapter", "svd_lowrank"),),
        rounds=3,
    ),
    "adapter_error": Row(
        f"error of an adapter of rank {_RANK} over the error of the best one",
        "width",
        (256, 512, 1024),
        (32, 64),
        {"save_adapter": adapter_error},
        kind="value",
        goals=(Goal("error over the best", 1.0001, lambda curves: max(curves["save_adapter"].values())),),
    ),
    "merged": Row(
        "writing a merged model, reading an adapter",
        "million parameters",
        _LLAMAS,
        _SMALL,
        _MERGED,
        goals=(
            at_most_times(1.5, "save_merged", "state_dict and save_file"),
            at_most_times(1.5, "load_adapter", "PEFT's from_pretrained"),
        ),
        rounds=3,
    ),
    "merged_memory": Row(
        "peak of writing a merged model, reading an adapter",
        "million parameters",
        _LLAMAS,
        _SMALL,
        _MERGED,
        kind="peak",
        goals=tuple(needs_at_most(0.1, name, model_bytes, largest_bytes) for name in ("save_merged", "load_adapter")),
    ),
    "checkpoint": Row(
        "checkpoints",
        "MB of state",
        _STATES,
        _SMALL_STATES,
        _CHECKPOINTS,
        goals=(
            at_most_times(1.5, "save", "save_file, fsync, sum"),
            at_most_times(1.5, "load", "sum, load_file, copy"),
            at_most_times(1.5, "load, donate", "sum, load_file"),
        ),
        rounds=9,
    ),
    "checkpoint_memory": Row(
        "peak of checkpoints",
        "MB of state",
        _STATES,
        _SMALL_STATES,
        _CHECKPOINTS,
        kind="peak",
        goals=(
            state_needs_at_most(0.1, "save"),
            state_needs_at_most(0.1, "copy, save in the background", copies=1),
            state_needs_at_most(0.1, "load"),
            state_needs_at_most(0.1, "load, donate"),
        ),
    ),
}
