"""State dicts in one or more safetensors files, read one tensor at a time."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dynlora_fn._core._check import check_by_name, check_path, described
from dynlora_fn._core._types import Params
from dynlora_fn.interop._arguments import check_tensors
from dynlora_fn.interop._state_dict import state_dict

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def safetensors() -> ModuleType:
    """Import and return the optional package that reads and writes files."""
    try:
        import safetensors.torch  # noqa: PLC0415, an optional extra
    except ImportError as error:
        raise ImportError("the package `safetensors` is not installed; run pip install 'dynlora-fn[files]'") from error
    return safetensors


class Weights(Mapping[str, Tensor]):
    """A mapping of names to tensors in safetensors files. Each access reads the tensor from its file again."""

    def __init__(self, where: Mapping[str, Path]):
        """Map names to files. Call `open_weights` instead."""
        self._paths = dict(where)

    def __getitem__(self, name: str) -> Tensor:
        path = self._paths[name]
        with _open(path) as file:
            try:
                tensor: Tensor = file.get_tensor(name)
            except (safetensors().SafetensorError, RuntimeError, TypeError) as error:  # depends on the version
                raise ValueError(
                    f"`path` has a damaged tensor {name!r} in {str(path)!r} ({error}); write the file again"
                ) from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def open_weights(path: Path | str) -> Weights:
    """Return the weights in a file or folder, each read when it is accessed.

    A folder contains model.safetensors, or shards with an index. Only names are read here. With a model on the meta
    device and these weights as `init`'s `weights`, only one stack of weights is in memory beside the parameters.

    Args:
        path: The file or folder.

    Returns:
        A mapping of names to tensors.

    Raises:
        ValueError: If there are no weights, a file is damaged, or an index names a file or a tensor that is missing.
            The message names the file or tensor.
        ImportError: If the extra `files` is not installed.

    Example:
        >>> import torch
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> save_weights({"w": torch.ones(2)}, f"{folder}/model.safetensors")
        >>> open_weights(folder)["w"]
        tensor([1., 1.])
    """
    check_path("path", path)
    path = Path(path)
    if path.is_dir() and (path / INDEX).is_file():
        return Weights(_indexed(path))
    file = path / SINGLE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"`path` has no {SINGLE} or {INDEX} in {str(path)!r}; pass a folder with one of them, or a file"
        )
    return Weights(dict.fromkeys(_names(file), file))


def _indexed(folder: Path) -> dict[str, Path]:
    files = read_json(folder / INDEX).get("weight_map")
    if not isinstance(files, dict) or not all(map(_is_file_name, files.values())):
        raise ValueError(
            f"{INDEX} has {files!r:.80} as `weight_map`; map names of tensors to names of files in its folder"
        )
    where = {name: folder / file for name, file in files.items()}
    for file in sorted(set(where.values())):
        if not file.is_file():
            raise ValueError(f"{INDEX} names the file {file.name!r}, which is not in its folder; add the file")
        if missing := {name for name, path in where.items() if path == file} - set(_names(file)):
            raise ValueError(
                f"{INDEX} names the tensor {sorted(missing)[0]!r}, which is not in {file.name!r}; write both again"
            )
    return where


def _is_file_name(value: object) -> bool:
    """Return whether a value is a plain file name, so that an index cannot point outside its folder."""
    return isinstance(value, str) and value not in ("", "..") and Path(value).name == value


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ValueError: If the file contains none. The message names the file.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not valid JSON in {str(path)!r} ({error}); write the file again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} has a JSON {type(content).__name__} in {str(path)!r}; write an object")
    return content


def _names(file: Path) -> list[str]:
    with _open(file) as handle:
        return list(handle.keys())


def _open(file: Path) -> Any:
    package = safetensors()
    try:
        return package.safe_open(file, framework="pt")
    except package.SafetensorError as error:
        raise ValueError(
            f"`path` is not a complete safetensors file: {str(file)!r} ({error}); write it again"
        ) from error


def save_weights(weights: Mapping[str, Tensor], file: Path | str, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file that `open_weights` reads.

    Tied tensors are written under each of their names.

    Args:
        weights: The tensors by name.
        file: The file to write. Its folder is created.
        metadata: The metadata of the file. Default None writes none.

    Raises:
        TypeError: If a weight is no tensor, or another argument has a wrong type.
        ImportError: If the extra `files` is not installed.

    Example:
        >>> import torch
        >>> import tempfile
        >>> file = f"{tempfile.mkdtemp()}/weights.safetensors"
        >>> save_weights({"w": torch.ones(2)}, file)
        >>> list(open_weights(file))
        ['w']
    """
    check_tensors("weights", weights)
    check_path("file", file)
    _check_metadata(metadata)
    addresses: set[int] = set()
    copies = {}
    for name, weight in weights.items():
        address = weight.untyped_storage().data_ptr()
        copies[name] = (
            weight.detach().cpu().contiguous().clone() if address in addresses else weight.detach().contiguous().cpu()
        )
        addresses.add(address)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    safetensors().torch.save_file(copies, file, metadata=dict(metadata or {}))


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    check_by_name("metadata", metadata, of="texts")
    for key, text in metadata.items():
        if not isinstance(text, str):
            raise TypeError(f"`metadata` has {described(text)} for {key!r}; use a text")


@torch.no_grad()
def save_merged(model: nn.Module, params: Params, folder: Path | str) -> None:
    """Write the model with dense weights, for ``from_pretrained`` or ``load_state_dict``.

    A model of `transformers` is written with ``save_pretrained``. For any other module only model.safetensors is
    written: load it with ``model.load_state_dict(dict(open_weights(folder)))``.

    Args:
        model: The model, read as in `state_dict`.
        params: The parameters, as for `call`.
        folder: The folder, which is created if it does not exist.

    Raises:
        ValueError: As `state_dict`.
        ImportError: If the extra `files` is not installed.

    Example:
        >>> import tempfile
        >>> import dynlora_fn as dl
        >>> model, folder = nn.Linear(6, 4), tempfile.mkdtemp()
        >>> save_merged(model, dl.init(model, rank=2, seed=0, targets=["weight"]), folder)
        >>> model.load_state_dict(dict(open_weights(folder)))
        <All keys matched successfully>
    """
    check_path("folder", folder)
    weights = state_dict(model, params)
    save = getattr(model, "save_pretrained", None)
    if save is None:
        save_weights(weights, Path(folder) / SINGLE)
    else:
        save(folder, state_dict=weights)
