"""Load a causal language model in float32.

A model is refused unless its files contain all its weights and no others.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from logging import Handler
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.finetune.model_folder import check_folder, left_out, without_fractions


def load_model(folder: str) -> nn.Module:
    """Load a causal language model in float32, whatever dtype its files have.

    The model is in evaluation mode, because a resumed run would not be exact with dropout. Code in the folder is not
    run.

    Raises:
        ValueError: If `transformers` is missing or cannot load the folder. Also if it would initialize a weight at
            random, or would leave out a tensor of the files. The message names the weight or tensor.
    """
    try:
        from transformers import AutoModelForCausalLM, logging  # noqa: PLC0415, an optional extra
    except ImportError as error:
        raise ValueError("`model` needs the extra `data`: pip install 'dynlora-fn[data]'") from error
    check_folder(Path(folder))
    logging.disable_progress_bar()
    with _captured(logging) as warnings:
        try:
            model, found = AutoModelForCausalLM.from_pretrained(
                Path(folder),
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # so that `found` has their names
                output_loading_info=True,
            )
        except Exception as error:  # the library raises many types for files that are damaged or of another kind
            cause = _unconverted(folder, warnings) or reason(error)
            raise ValueError(f"`model` must contain a causal language model, got {folder!r}: {cause}") from error
    _check_complete(folder, found)
    _check_kinds(folder, model)
    evaluated: nn.Module = model.eval()
    return evaluated


@contextmanager
def _captured(logging: Any) -> Iterator[list[str]]:
    """Collect the warnings of `transformers` instead of printing them.

    If tensors do not fit the model, one warning is a table of them.
    """
    warnings: list[str] = []
    handler = Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.disable_default_handler()
    logging.add_handler(handler)
    try:
        yield warnings
    finally:
        logging.remove_handler(handler)
        logging.enable_default_handler()


def _unconverted(folder: str, warnings: Iterable[str]) -> str:
    """Return a message about the first weight that could not be built from the files.

    Some models join several tensors of the files into one weight. The table in the warnings marks a failure of this.
    """
    lines = (re.sub(r"\x1b\[[0-9;]*m", "", line) for text in warnings for line in text.splitlines())
    names = [line.split("|")[0].strip() for line in lines if re.search(r"\| *CONVERSION", line)]
    return f"the tensors for {names[0]!r} do not fit together{_hint(folder)}" if names else ""


def _hint(folder: str) -> str:
    name = left_out(Path(folder))
    return f"; the files have no {name!r}" if name else ""


def reason(error: Exception) -> str:
    """Return type and message of an error of another library in one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:300]}" if message else type(error).__name__


def _check_complete(folder: str, found: dict[str, Any]) -> None:
    """Raise ValueError for the first weight that is not in both files and model."""
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"`model` must have all weights that its config.json describes, got {folder!r} without {_names(missing)}"
        )
    if mismatched := sorted(found["mismatched_keys"]):
        name, in_file, in_model = mismatched[0]
        raise ValueError(
            f"`model` must have the shapes that its config.json describes, got {folder!r} with {name!r} of shape "
            f"{tuple(in_file)} instead of {tuple(in_model)}{_hint(folder)}"
        )
    if unexpected := sorted(found["unexpected_keys"]):
        raise ValueError(
            f"`model` must have only weights that its config.json describes, got {folder!r} with {_names(unexpected)}, "
            "which would be lost"
        )


def _check_kinds(folder: str, model: nn.Module) -> None:
    """Raise ValueError for the first weight of integers or booleans in the files.

    `transformers` would convert it to floating point.
    """
    if wrong := sorted(without_fractions(Path(folder)) & dict(model.named_parameters()).keys()):
        raise ValueError(
            f"`model` must have weights of floating point, got {folder!r} with integers or booleans as {_names(wrong)}"
        )


def _names(names: list[str]) -> str:
    return repr(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


@torch.no_grad()
def check_on_tokens(model: nn.Module, vocabulary: int, seq_len: int) -> None:
    """Check that the model takes sequences of this length and is causal.

    This takes one forward pass.

    Raises:
        ValueError: If the length exceeds the positions of the model, or if the forward pass fails. Also if logits are
            not finite or depend on later tokens.
    """
    config: Any = model.config
    most = positions(config)
    if most is not None and seq_len > most:
        raise ValueError(f"`seq_len` must be at most the positions of the model, {most}, got {seq_len}")
    padding = getattr(config.get_text_config(), "pad_token_id", None)
    ids = torch.tensor([token for token in range(vocabulary) if token != padding] or [0])
    tokens = ids[torch.arange(seq_len) % len(ids)].repeat(2, 1)
    tokens[1, -1] = ids[seq_len % len(ids)]
    try:
        logits = model(tokens).logits
    except (IndexError, RuntimeError, ValueError) as error:
        raise ValueError(f"`seq_len` must be a length that the model takes, got {seq_len}: {reason(error)}") from error
    if not logits.isfinite().all():
        raise ValueError("`model` must give finite logits, got nan or inf; its weights are damaged")
    before = logits[:, :-1]
    if seq_len > 1 and (before[0] - before[1]).abs().max() > 1e-5 * before.abs().max():
        raise ValueError(
            "`model` must predict each token from those before it, got one whose logits change with later tokens; "
            "set `is_decoder` in its config.json if it has this entry"
        )


def trained_positions(config: Any) -> int | None:
    """Return the most tokens that a configuration names, or None without a limit."""
    names = ("max_position_embeddings", "max_target_positions", "max_seq_len")
    limits = (getattr(config.get_text_config(), name, None) for name in names)
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def positions(config: Any) -> int | None:
    """Return the longest sequence for a configuration, or None without a limit.

    Scaled rotary positions multiply the length in pre-training by their `factor`.
    """
    most, config = trained_positions(config), config.get_text_config()
    if most is None:
        return None
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    scaled = [
        int(entry["factor"] * (entry.get("original_max_position_embeddings") or most))
        for entry in [rotary, *rotary.values()]
        if isinstance(entry, dict) and entry.get("factor")
    ]
    return max([most, *scaled])
