"""Read the settings of a PEFT adapter.

A setting without an entry here is refused, unless it is off: None, False or empty.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dynlora_fn.interop._peft_layers import CONFIG
from dynlora_fn.interop._safetensors import read_json

# Settings of training, details of settings that are off, and settings about the file. No output depends on them.
_WITHOUT_INFLUENCE = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode",
        "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type", "peft_version",
        "qalora_group_size", "revision", "runtime_config", "task_type",
    }
)  # fmt: skip
# Settings of LoraConfig in PEFT 0.21 that change the equation of a layer, the model, or the tensors of a file.
_UNSUPPORTED = frozenset(
    {
        "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "megatron_config",
        "monteclora_config", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "velora_config",
    }
)  # fmt: skip
# Why the weight is not the sum of a frozen base and ``alpha / rank * B @ A``.
_REASONS = {
    "alora_invocation_tokens": "the product is added for some tokens only",
    "layer_replication": "the model has other layers",
    "lora_bias": "the product has a bias",
    "trainable_token_indices": "rows of an embedding are replaced",
    "use_dora": "its magnitude and norm scale the frozen base too, so that steps and folds would have to change both",
    "use_qalora": "inputs are averaged in groups",
}
# Other values of `init_lora_weights`, such as "pissa", make PEFT change the base weights when it loads the adapter.
_STARTS = ("true", "false", "none", "gaussian", "orthogonal", "eva", "mica")


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the adapter in a folder.

    Raises:
        ValueError: If the folder has no settings, or a setting is unknown, has a wrong type, or changes what the
            adapter means. The message names the setting and its value.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(f"`folder` has no {CONFIG} in {str(folder)!r}; pass the folder of a PEFT adapter")
    settings = read_json(folder / CONFIG)
    if settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type")
        raise ValueError(
            f"`folder` has an adapter of type {kind!r}; pass one of type 'LORA', which {CONFIG} has as `peft_type`"
        )
    for name in ("r", "lora_alpha", *settings):
        _check(name, settings.get(name))
    if settings.get("target_modules") is None and not settings.get("target_parameters"):
        raise ValueError(
            f"{CONFIG} has None as `target_modules`, for which PEFT takes names from a table; "
            "list the names of the adapted layers there"
        )
    return settings


def _check(name: str, value: Any) -> None:
    if name in _WITHOUT_INFLUENCE:
        return
    if name in _SETTINGS:
        is_valid, wanted = _SETTINGS[name]
        if not (is_valid(value) or (value is None and name not in ("r", "lora_alpha"))):
            raise ValueError(f"{CONFIG} has {_short(value)} as `{name}`; use {wanted}")
        return
    is_off = value is None or value is False or (isinstance(value, str | list | dict) and not value)
    if not is_off and name in _UNSUPPORTED:
        reason = f" ({_REASONS[name]})" if name in _REASONS else ""
        raise ValueError(
            f"the adapter has {name} = {_short(value)}, which is not plain LoRA{reason}; merge it into the model with "
            "PEFT"
        )
    if not is_off:
        raise ValueError(
            f"{CONFIG} has the unknown setting {name} = {_short(value)}; merge the adapter into the model with PEFT"
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _is_expression(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _list_of(is_valid: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(is_valid, value))


def _by_expression(is_valid: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: (
        isinstance(value, dict) and all(map(is_valid, value.values())) and all(map(_is_expression, value))
    )


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_selection(value: object) -> bool:
    """Return whether a value selects layers by their names.

    "all-linear" does not: what it selects depends on the type of the model.
    """
    return (_is_expression(value) and str(value).lower() != "all-linear") or _list_of(_is_name)(value)


def _is_start(value: object) -> bool:
    return isinstance(value, bool | str) and str(value).lower() in _STARTS


# The settings that are read, each with a check of its value and a text of what it may be.
_SETTINGS: dict[str, tuple[Callable[[object], bool], str]] = {
    "r": (_is_rank, "an integer of at least 1"),
    "lora_alpha": (_is_number, "a finite number"),
    "use_rslora": (lambda value: isinstance(value, bool), "True or False"),
    "rank_pattern": (_by_expression(_is_rank), "regular expressions of layer names with integers of at least 1"),
    "alpha_pattern": (_by_expression(_is_number), "regular expressions of layer names with finite numbers"),
    "target_modules": (_is_selection, "names of layers, or a regular expression, as PEFT writes them"),
    "exclude_modules": (_is_selection, "names of layers, or a regular expression"),
    "target_parameters": (_list_of(_is_name), "names of parameters"),
    "layers_to_transform": (
        lambda value: _is_integer(value) or _list_of(_is_integer)(value),
        "the index of a layer, or indices",
    ),
    "layers_pattern": (
        lambda value: _is_expression(value) or _list_of(_is_expression)(value),
        "names of lists of layers",
    ),
    "modules_to_save": (_list_of(lambda value: _is_name(value) and _is_expression(value)), "names of modules"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'"),
    "ensure_weight_tying": (lambda value: isinstance(value, bool), "True or False"),
    "init_lora_weights": (
        _is_start,
        f"one of {', '.join(_STARTS)}, because PEFT changes the base weights for others; save the adapter with "
        "`path_initial_model_for_weight_conversion`, or merge it into the model with PEFT",
    ),
}
