"""Check the folder of a model before `transformers` reads it.

Other functions return the files of its weights, their dtypes and a digest.
"""

import hashlib
import json
import re
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

import torch

import dynlora_fn as dl

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_REFUSED = {  # refused entries of config.json, with their meaning and the remedy
    "auto_map": "code, which is never run; remove the entry if `transformers` has this model itself",
    "quantization_config": "quantized weights; save the model dequantized",
    "transformers_weights": "weights under another name; call the file model.safetensors",
}
# If such an entry is the name of a repository, `transformers` would download and run code from there.
_IMPLEMENTATIONS = (
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
)
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def check_folder(folder: Path) -> None:
    """Check the folder for contents that `transformers` does not refuse.

    For these, `transformers` would ask whether to run code, draw random weights, or load another model.

    Raises:
        ValueError: If the folder needs code, is an adapter, is quantized, or has damaged or no weights. The message
            names the entry, the file or the tensor.
    """
    options = _read(folder / "config.json")
    for entry, meaning in _REFUSED.items():
        if options.get(entry) is not None:
            raise ValueError(f"`model` must not have {entry!r} in config.json, got {str(folder)!r} with {meaning}")
    for entry in _IMPLEMENTATIONS:
        if "/" in str(options.get(entry)):
            raise ValueError(f"`model` must not name code in config.json, got {entry!r} {options[entry]!r}; remove it")
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"`model` must be a model, got an adapter: {str(folder)!r} has adapter_config.json; merge it with PEFT"
        )
    weight_files(folder)


def check_tokenizer_folder(folder: Path) -> None:
    """Check that the tokenizer in a folder needs no code from there.

    Raises:
        ValueError: If it needs code, or its tokenizer_config.json is damaged.
    """
    path = folder / "tokenizer_config.json"
    if path.is_file() and _read(path).get("auto_map") is not None:
        raise ValueError(
            f"`tokenizer` must not have 'auto_map' in tokenizer_config.json, got {str(folder)!r} with code, which is "
            "never run; remove the entry if `transformers` has this tokenizer itself"
        )


def weight_files(folder: Path) -> list[Path]:
    """Return the files of the weights.

    If the folder has weights in several formats, the files are in the format that `transformers` prefers.

    Raises:
        ValueError: If there are no weights, or if a file is missing or damaged. The message names it.
    """
    if (folder / _SINGLE).is_file() or (folder / _INDEX).is_file():
        try:
            single = folder / _SINGLE
            with dl.interop.open_weights(single if single.is_file() else folder) as weights:
                return sorted({weights.file(name) for name in weights})
        except (ValueError, OSError) as error:
            raise ValueError(f"`model` must have undamaged weights, got {str(folder)!r}: {error}") from error
    files = sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"`model` must have weights in {_SINGLE} or its shards, got {str(folder)!r} without them")
    return files


def stored_dtypes(folder: Path) -> set[torch.dtype]:
    """Return the dtypes of the floating-point tensors in the files.

    Formats of fewer than 16 bits count as float32.
    """
    return {dtype for file in weight_files(folder) for dtype in _dtypes_of(file).values() if dtype is not None}


def without_fractions(folder: Path) -> set[str]:
    """Return the names of the tensors that are not floating point.

    Such a tensor may be a buffer, for example of positions.
    """
    return {name for file in weight_files(folder) for name, dtype in _dtypes_of(file).items() if dtype is None}


def _dtypes_of(file: Path) -> dict[str, torch.dtype | None]:
    """Return the dtype of each tensor in a file, or None if it is not floating point."""
    if file.suffix == ".bin":
        tensors = torch.load(file, map_location="meta", weights_only=True).items()
        return {name: tensor.dtype if tensor.is_floating_point() else None for name, tensor in tensors}
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    names = {name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    return {name: _DTYPES.get(kind, torch.float32) if "F" in kind else None for name, kind in names.items()}


def left_out(folder: Path) -> str | None:
    """Return the name of a tensor that is missing, judged by the other names.

    Names that differ only in their numbers must have all combinations of these numbers. For example, an expert of one
    layer may be missing.

    Returns:
        The first missing name, or None.
    """
    names = {name for file in weight_files(folder) if file.suffix != ".bin" for name in dl.interop.open_weights(file)}
    numbers = defaultdict(set)
    for name in names:
        numbers[re.sub(r"\d+", "{}", name)].add(tuple(re.findall(r"\d+", name)))
    for pattern in sorted(numbers):
        axes = [sorted(set(axis), key=int) for axis in zip(*numbers[pattern], strict=True)]
        for values in product(*axes):
            if values not in numbers[pattern]:
                return pattern.format(*values)
    return None


def digest(folder: Path) -> str:
    """Return a hash of config.json and the weights, whatever the folder is called."""
    hashes = hashlib.sha256()
    for path in [folder / "config.json", *weight_files(folder)]:
        with path.open("rb") as file:
            hashes.update(hashlib.file_digest(file, "sha256").digest())
    return hashes.hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        options = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"`model` must have valid JSON in {str(path)!r}: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"`model` must have an object in {str(path)!r}, got {options!r:.60}")
    return options
