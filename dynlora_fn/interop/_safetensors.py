"""State dicts in safetensors files, one or several, read a tensor at a time."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dynlora_fn._core._types import Params
from dynlora_fn.interop._state_dict import state_dict

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def safetensors() -> ModuleType:
    """The package, which only reading and writing files needs."""
    try:
        import safetensors.torch  # noqa: PLC0415, an optional extra
    except ImportError as error:
        raise ImportError("files need the extra `files`: pip install 'dynlora-fn[files]'") from error
    return safetensors


class Weights(Mapping[str, Tensor]):
    """The tensors of safetensors files by name, each read from its file when it is asked for and not kept."""

    def __init__(self, where: Mapping[str, Path]):
        """Use `open_weights`."""
        self._where = dict(where)

    def __getitem__(self, name: str) -> Tensor:
        path = self._where[name]
        with _opened(path) as file:
            try:
                tensor: Tensor = file.get_tensor(name)
            except (safetensors().SafetensorError, RuntimeError, TypeError) as error:  # as its versions have it
                raise ValueError(f"`path` must hold {name!r} whole, got {str(path)!r}: {error}") from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def open_weights(path: Path | str) -> Weights:
    """The weights in a file, or in a folder with model.safetensors or with its shards and their index.

    Nothing is read but names: a model that is made on the meta device and given these as `init`'s `weights` is never in
    memory beside its parameters, but for a stack at a time.

    Args:
        path: of a file or a folder.

    Raises:
        ValueError: if there is none, it is damaged, or an index names a file or a tensor that is missing; it names it.
    """
    path = Path(path)
    if path.is_dir() and (path / INDEX).is_file():
        return Weights(_indexed(path))
    file = path / SINGLE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"`path` must hold {SINGLE} or {INDEX}, or be a file, got {str(path)!r}")
    return Weights(dict.fromkeys(_names(file), file))


def _indexed(folder: Path) -> dict[str, Path]:
    files = read_json(folder / INDEX).get("weight_map")
    if not isinstance(files, dict) or not all(map(_is_file_name, files.values())):
        raise ValueError(f"{INDEX} must map names of tensors to files beside it as `weight_map`, got {files!r:.80}")
    where = {name: folder / file for name, file in files.items()}
    for file in sorted(set(where.values())):
        if not file.is_file():
            raise ValueError(f"`path` must hold every file that {INDEX} names, got none called {file.name!r}")
        if missing := {name for name, own in where.items() if own == file} - set(_names(file)):
            raise ValueError(f"{INDEX} must name what is there, got {sorted(missing)[0]!r}, not in {file.name!r}")
    return where


def _is_file_name(value: object) -> bool:
    """Of a file beside the index: it cannot point elsewhere."""
    return isinstance(value, str) and value not in ("", "..") and Path(value).name == value


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        ValueError: if it holds none; it names the file.
    """
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} must hold JSON, got {str(path)!r}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} must hold a JSON object, got {type(found).__name__} in {str(path)!r}")
    return found


def _names(file: Path) -> list[str]:
    with _opened(file) as opened:
        return list(opened.keys())


def _opened(file: Path) -> Any:
    package = safetensors()
    try:
        return package.safe_open(file, framework="pt")
    except package.SafetensorError as error:
        raise ValueError(f"`path` must be a whole safetensors file, got {str(file)!r}: {error}") from error


def save_weights(weights: Mapping[str, Tensor], file: Path | str, *, metadata: Mapping[str, str] | None = None) -> None:
    """Writes one safetensors file that `open_weights` reads; tied tensors are written under each of their names.

    Args:
        weights: by name.
        file: to write.
        metadata: of the file.
    """
    seen: set[int] = set()
    own = {}
    for name, weight in weights.items():
        address = weight.untyped_storage().data_ptr()
        own[name] = (
            weight.detach().cpu().contiguous().clone() if address in seen else weight.detach().contiguous().cpu()
        )
        seen.add(address)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    safetensors().torch.save_file(own, file, metadata=dict(metadata or {}))


@torch.no_grad()
def save_merged(model: nn.Module, params: Params, folder: Path | str) -> None:
    """Writes the model with its weights dense: what ``from_pretrained(folder)`` takes, for a model of `transformers`.

    For any other module, model.safetensors alone: ``model.load_state_dict(dict(open_weights(folder)))``.

    Args:
        model: looked at as `state_dict` does.
        params: as for `call`.
        folder: is made if it is not there.
    """
    weights = state_dict(model, params)
    save = getattr(model, "save_pretrained", None)
    if save is None:
        save_weights(weights, Path(folder) / SINGLE)
    else:
        save(folder, state_dict=weights)
