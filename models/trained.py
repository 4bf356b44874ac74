"""Open a model that `models.pretrain` or `models.finetune` has trained.

A folder of any causal language model of `transformers` can be opened too.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

import dynlora_fn as dl
from dynlora_fn.interop._agree import members_of
from dynlora_fn.interop._checkpoint_read import Stored, read_headers, read_into
from dynlora_fn.interop._checkpoint_state import contents_of
from dynlora_fn.interop._checksums import find_damage
from models import llama
from models.finetune import config as finetune
from models.finetune.load import check_on_tokens, load_model, trained_positions
from models.finetune.run import default_targets, embedded_tokens, untrained_names
from models.pretrain import config as pretrain
from models.pretrain.folder import checkpoint_settings
from models.pretrain.method import make_method
from models.pretrain.prepared import Saved
from models.pretrain.settings import with_options
from models.pretrain.stopping import last_checkpoint

WEIGHTS = "model.safetensors"
_BASE = re.compile(r"(\.frozen\['[^']*'\]\.base)")
_DEFAULT_CONTEXT = 1024  # of a model whose configuration does not limit its positions
_CHECKED = 8  # tokens that show whether a model sees later ones


class Trained(NamedTuple):
    """A model with dense weights, and how it was trained."""

    model: nn.Module
    tokenizer: str | None  # the name, folder or file of a tokenizer for `transformers`; None means bytes
    context: int  # the largest number of tokens that the model sees
    config: pretrain.Config | None  # the options of the run; None for a model that is not from a run
    source: Path  # the file or folder with the weights
    folder: Path | None  # of the run; None for a model that is not from a run


def open_trained(path: Path, device: torch.device) -> Trained:
    """Return a trained model on a device.

    Args:
        path: The folder of a run, a checkpoint in the run's folder checkpoints, or a model folder for `transformers`.
            For a run, its final model is opened, or its newest checkpoint if it has not ended.
        device: The device for the weights.

    Raises:
        ValueError: If the path is none of these, a file is damaged, or a model sees later tokens. The message names the
            file.
    """
    path = Path(os.path.abspath(path))  # `.` has no name
    is_checkpoint = path.parent.name == "checkpoints" and not (path / "config.json").is_file()
    folder = path.parent.parent if is_checkpoint else path
    options = pretrain.Config.defaults_before | _read_options(folder)
    if "model_type" in options:
        return _pretrained(folder, None, device)
    checkpoint_path, file = path if is_checkpoint else None, folder / "config.json"
    if "train_rest" in options:
        return _of_finetuning(folder, with_options(finetune.Config(), options, file), checkpoint_path, device)
    return _of_pretraining(folder, with_options(pretrain.Config(), options, file), checkpoint_path, device)


def check_tokens(trained: Trained, largest: int) -> None:
    """Raise ValueError if the model does not embed all tokens of a text.

    `largest` is the largest of them.
    """
    model: Any = trained.model
    count = model.config.vocabulary if isinstance(model, llama.Llama) else embedded_tokens(model)
    if largest >= count:
        raise ValueError(
            f"`run` must embed the tokens of its tokenizer, got the token {largest} for a model that embeds {count}; "
            "resize its embeddings, or use the tokenizer that it was trained with"
        )


def _read_options(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"`run` is {str(folder)!r}, which has no config.json; pass the folder of a run, a checkpoint in it, "
            "or a folder that `from_pretrained` opens"
        )
    try:
        options = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`run` has no valid JSON in {str(path)!r}: {error}") from error
    if not isinstance(options, dict) or not options.keys() & {"model_type", "corpus"}:
        raise ValueError(f"`run` has {str(path)!r}, which is neither of a run nor of a model of `transformers`")
    return options


def _of_pretraining(folder: Path, config: pretrain.Config, path: Path | None, device: torch.device) -> Trained:
    is_final = path is None and (folder / WEIGHTS).is_file() and not _goes_on(folder, config)
    source = folder / WEIGHTS if is_final else path or _newest_checkpoint(folder)
    if is_final:
        model = _load_weights(source)
    else:
        stored = _headers(source)
        embedding = ".state.trainable['embedding.weight']"
        vocabulary = stored.shape(embedding)[0] if embedding in stored.chunks else None
        model = llama.Llama(llama.config(config.training.model, vocabulary))
        _load_checkpoint(source, stored, config, model, llama.TARGETS)
    tokenizer = config.tokenizer()
    if tokenizer and _has_tokenizer(folder / "model"):  # the original tokenizer may have moved
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
    tokenizer = config.tokenizer()
    if path is None and (folder / "model" / "config.json").is_file() and not _goes_on(folder, config):
        trained = _pretrained(folder / "model", config, device)
        tokenizer = trained.tokenizer if _has_tokenizer(folder / "model") else tokenizer
        return trained._replace(tokenizer=tokenizer, folder=folder)
    source = path or _newest_checkpoint(folder)
    model = load_model(config.training.model)
    _load_checkpoint(source, _headers(source), config, model, default_targets(model))
    return Trained(model.to(device).eval(), tokenizer, _context(model), config, source, folder)


def _pretrained(folder: Path, config: pretrain.Config | None, device: torch.device) -> Trained:
    model = load_model(str(folder))
    check_on_tokens(model, embedded_tokens(model), min(_CHECKED, _context(model)))
    return Trained(model.to(device), str(folder), _context(model), config, folder, None)


def _context(model: nn.Module) -> int:
    return trained_positions(model.config) or _DEFAULT_CONTEXT


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def _newest_checkpoint(folder: Path) -> Path:
    checkpoints = sorted((folder / "checkpoints").glob("step-" + 8 * "[0-9]"))
    if not checkpoints:
        raise ValueError(f"`run` is {str(folder)!r}, which has neither a final model nor a checkpoint; train it first")
    return checkpoints[-1]


def _goes_on(folder: Path, config: pretrain.Config) -> bool:
    """Return whether a run that had ended goes on with more steps.

    Its final model is then an older one.
    """
    try:
        steps = json.loads((folder / "summary.json").read_bytes())["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    last = last_checkpoint(folder)
    return isinstance(steps, int) and steps < config.training.steps and last is not None and last > steps


def _headers(path: Path) -> Stored:
    """Verify the files of a checkpoint and return their headers.

    Raises:
        ValueError: If a file is damaged.
    """
    if damage := find_damage(path, process=0, world_size=1):
        raise ValueError(f"`run` has a damaged checkpoint {str(path)!r}: {damage}")
    return read_headers(path)


def _load_checkpoint(
    path: Path, stored: Stored, config: pretrain.Config, model: nn.Module, targets: Sequence[str]
) -> None:
    """Load the weights of a checkpoint into the model, without the optimizer's state.

    Raises:
        ValueError: If the checkpoint is not from the run in the same folder.
    """
    _check_settings(path, stored, config)
    alone = replace(  # this machine may have neither the processes nor the devices of the run
        config,
        training=replace(config.training, trained=config.trained(), rank=config.rank()),
        machine=replace(config.machine, shard=False, shard_factors=False, device="cpu"),
        precision=replace(config.precision, residual_device=None),
        switching=replace(config.switching, candidates="seeded"),
    )
    untrained = partial(untrained_names, config) if isinstance(config, finetune.Config) else lambda _: ()
    state = make_method(alone, model, targets, untrained).state._replace(opt_state=())
    for name, piece in contents_of("state", Saved(state, {}), members_of(None)).pieces.items():
        # In the paths of sharded bases there is one more `.base`.
        path_in_file = name if name in stored.chunks else _BASE.sub(r"\1.base", name)
        shape = stored.shape(path_in_file) if path_in_file in stored.chunks else None
        if shape != piece.shape:
            found = "no tensor" if shape is None else f"the shape {shape}"
            raise ValueError(
                f"`run` has a checkpoint {str(path)!r} with {found} for {name} of shape {piece.shape}; "
                "it must be of the run in the same folder"
            )
        read_into(piece, stored.chunks[path_in_file])
    model.load_state_dict(dl.state_dict(model, state.params()))


def _check_settings(path: Path, stored: Stored, config: pretrain.Config) -> None:
    """Check that a checkpoint is from the run. Older checkpoints have no settings."""
    settings = checkpoint_settings(config, {})
    for name, value in stored.description.get("settings", {}).items():
        if name in settings and settings[name] != value:
            raise ValueError(
                f"`run` has a checkpoint {str(path)!r} with the setting {name} {value!r} instead of "
                f"{settings[name]!r}; it must be of the run in the same folder"
            )
