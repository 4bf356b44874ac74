"""Open the model that `models.pretrain` or `models.finetune` has trained, or any causal one of `transformers`."""

import json
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.utils._pytree import tree_map

import dynlora_fn as dl
from models import llama
from models.finetune import config as finetune
from models.finetune.run import default_targets, load_model, untrained_names
from models.pretrain import config as pretrain
from models.pretrain.checkpoint_reader import Reader
from models.pretrain.checksums import find_damage
from models.pretrain.method import State, init_params
from models.pretrain.prepared import Saved
from models.pretrain.processes import SINGLE_PROCESS
from models.pretrain.settings import with_options

WEIGHTS = "model.safetensors"
_BASE = re.compile(r"(\.frozen\['[^']*'\]\.base)")
_DEFAULT_CONTEXT = 1024  # of a model whose configuration does not limit its positions

Shapes = dict[str, tuple[int, ...]]


class Trained(NamedTuple):
    """A model with dense weights, and how it was trained."""

    model: nn.Module
    tokenizer: str | None  # name, folder or file of a tokenizer for `transformers`; None: tokens are bytes
    context: int  # the largest number of tokens that the model sees
    config: pretrain.Config | None  # the options of the run; None for a model that is not of a run
    source: Path  # the file or folder with the weights
    folder: Path | None  # of the run


def open_trained(path: Path, device: torch.device) -> Trained:
    """Return a trained model on a device.

    Args:
        path: The folder of a run, a checkpoint in the run's folder checkpoints, or a model folder for `transformers`.
            A run means its final model, or the newest checkpoint of a run that has not ended.
        device: The device of the weights.

    Raises:
        ValueError: If there is none of these, or a file is damaged. The message names it.
    """
    path = Path(os.path.abspath(path))  # `.` has no name
    is_checkpoint = path.parent.name == "checkpoints" and not (path / "config.json").is_file()
    folder = path.parent.parent if is_checkpoint else path
    options = _read_options(folder)
    if "model_type" in options:
        return _pretrained(folder, None, device)
    checkpoint_path, file = path if is_checkpoint else None, folder / "config.json"
    if "train_rest" in options:
        return _of_finetuning(folder, with_options(finetune.Config(), options, file), checkpoint_path, device)
    return _of_pretraining(folder, with_options(pretrain.Config(), options, file), checkpoint_path, device)


def _read_options(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"`run` is {str(folder)!r}, which has no config.json; pass the folder of a run, a checkpoint in it, "
            "or a folder that `from_pretrained` opens"
        )
    try:
        options = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"`run` has no valid JSON in {str(path)!r}: {error}") from error
    if not isinstance(options, dict) or not options.keys() & {"model_type", "corpus"}:
        raise ValueError(f"`run` has {str(path)!r}, which is neither of a run nor of a model of `transformers`")
    return options


def _of_pretraining(folder: Path, config: pretrain.Config, path: Path | None, device: torch.device) -> Trained:
    is_final = path is None and (folder / WEIGHTS).is_file()
    source = folder / WEIGHTS if is_final else path or _newest_checkpoint(folder)
    if is_final:
        model = _load_weights(source)
    else:
        shapes = _shapes(source)
        vocabulary = shapes.get(".state.trainable['embedding.weight']", (0,))[0]
        model = llama.Llama(llama.config(config.training.model, vocabulary))
        _load_checkpoint(source, shapes, config, model, llama.TARGETS)
    tokenizer = config.data.tokenizer
    if tokenizer and _has_tokenizer(folder / "model"):  # also where the given one has moved
        tokenizer = str(folder / "model")
    return Trained(model.to(device).eval(), tokenizer, config.data.seq_len, config, source, folder)


def _load_weights(path: Path) -> llama.Llama:
    try:
        with safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {})["llama"])
        with torch.device("meta"):
            model = llama.Llama(llama.config(description["name"], description["vocabulary"]))
        model.load_state_dict(dict(dl.interop.open_weights(path)), assign=True)
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"`run` has a damaged file {str(path)!r}: {error}") from error
    return model


def _of_finetuning(folder: Path, config: finetune.Config, path: Path | None, device: torch.device) -> Trained:
    tokenizer = config.data.tokenizer or config.training.model
    if path is None and (folder / "model" / "config.json").is_file():
        trained = _pretrained(folder / "model", config, device)
        tokenizer = trained.tokenizer if _has_tokenizer(folder / "model") else tokenizer
        return trained._replace(tokenizer=tokenizer, folder=folder)
    source = path or _newest_checkpoint(folder)
    model = load_model(config.training.model)
    _load_checkpoint(source, _shapes(source), config, model, default_targets(model))
    return Trained(model.to(device).eval(), tokenizer, _context(model), config, source, folder)


def _pretrained(folder: Path, config: pretrain.Config | None, device: torch.device) -> Trained:
    model = load_model(str(folder))
    return Trained(model.to(device), str(folder), _context(model), config, folder, None)


def _context(model: nn.Module) -> int:
    return getattr(model.config, "max_position_embeddings", None) or _DEFAULT_CONTEXT


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def _newest_checkpoint(folder: Path) -> Path:
    checkpoints = sorted((folder / "checkpoints").glob("step-" + 8 * "[0-9]"))
    if not checkpoints:
        raise ValueError(f"`run` is {str(folder)!r}, which has neither a final model nor a checkpoint; train it first")
    return checkpoints[-1]


def _shapes(path: Path) -> Shapes:
    """Return the shapes of a checkpoint's tensors, after a check of its files."""
    if damage := find_damage(path, SINGLE_PROCESS):
        raise ValueError(f"`run` has a damaged checkpoint {str(path)!r}: {damage}")
    metadata = Reader(str(path)).read_metadata().state_dict_metadata
    return {name: tuple(tensor.size) for name, tensor in metadata.items()}


def _load_checkpoint(
    path: Path, shapes: Shapes, config: pretrain.Config, model: nn.Module, targets: Sequence[str]
) -> None:
    """Load the weights of a checkpoint into the model. The optimizer's state is not read."""
    params = init_params(config, model, targets)
    untrained = untrained_names(config, params) if isinstance(config, finetune.Config) else []
    state = tree_map(torch.empty_like, State(*dl.partition(params, frozen=untrained), ()))
    tensors: dict[str, Tensor] = dl.parallel.as_dtensors(Saved(state, {}))
    # Bases that were sharded are one level deeper.
    tensors = {name if name in shapes else _BASE.sub(r"\1.base", name): tensor for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if shapes.get(name) != tuple(tensor.shape):
            raise ValueError(
                f"`run` has a checkpoint {str(path)!r} with {name} of shape {shapes.get(name)} instead of "
                f"{tuple(tensor.shape)}; it must be of the run in the same folder"
            )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a single process reads it
        checkpoint.load(tensors, storage_reader=Reader(str(path)))
    model.load_state_dict(dl.state_dict(model, state.params()))
