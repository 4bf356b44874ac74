"""Read one or more safetensors files, a tensor at a time."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from dynlora_fn._core._check import check_path

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_END_OF_INDEX = ".safetensors.index.json"
MOST_OPEN_FILES = 128  # by one `Weights`; an operating system allows a process about a thousand


def safetensors() -> ModuleType:
    """Import and return the optional package that reads and writes files."""
    try:
        import safetensors.torch  # noqa: PLC0415, an optional extra
    except ImportError as error:
        raise ImportError("the package `safetensors` is not installed; run pip install 'dynlora-fn[files]'") from error
    return safetensors


class _OpenFile(NamedTuple):
    handle: Any  # of `safetensors.safe_open`
    stamp: tuple[int, ...]  # changes when the file is replaced or written


class Weights(Mapping[str, Tensor]):
    """A mapping of names to tensors in safetensors files.

    Each access reads the tensor from its file again. A file is opened at the first access, and stays open until
    `close`, the end of a ``with`` block, or the deletion of this object. At most 128 files are open: for another one,
    the file that was opened first is closed. An access after a file was closed or replaced opens it again. A copy of
    this object, also in another process, opens the files again.
    """

    def __init__(self, where: Mapping[str, Path]):
        """Map names to files. Users call `open_weights`."""
        self._paths = dict(where)
        self._open: dict[Path, _OpenFile] = {}

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._read(name, lambda handle: handle.get_tensor(name))
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        shape: tuple[int, ...] = self._read(name, lambda handle: tuple(handle.get_slice(name).get_shape()))
        return shape

    def file(self, name: str) -> Path:
        """Return the file that has a tensor."""
        return self._paths[name]

    def __contains__(self, name: object) -> bool:
        return name in self._paths

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def close(self) -> None:
        """Close all files. Tensors that were read stay valid."""
        for file in self._open.values():
            file.handle.__exit__(None, None, None)
        self._open.clear()

    def __enter__(self) -> "Weights":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[type["Weights"], tuple[dict[str, Path]]]:
        return Weights, (self._paths,)

    def _read(self, name: str, read: Callable[[Any], Any]) -> Any:
        path = self._paths[name]
        handle = self._handle(path)
        try:
            return read(handle)
        except (safetensors().SafetensorError, RuntimeError, TypeError) as error:  # depends on the version
            raise ValueError(
                f"`path` has a damaged tensor {name!r} in {str(path)!r} ({error}); write the file again"
            ) from error

    def _handle(self, path: Path) -> Any:
        status = path.stat()
        stamp = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
        file = self._open.get(path)
        if file is None or file.stamp != stamp:
            while len(self._open) >= MOST_OPEN_FILES:
                self._open.pop(next(iter(self._open)))
            file = self._open[path] = _OpenFile(_open(path), stamp)
        return file.handle


def open_weights(path: Path | str) -> Weights:
    """Return the weights in a file or folder, each read when it is accessed.

    Only names are read here. Pass the result as `weights` to `init`, with a model on the meta device: then only one
    stack of weights is in memory besides the parameters. Files are not mapped into memory. They stay open (see
    `Weights.close`). If a folder contains model.safetensors and an index, the single file is read, as in
    `transformers`.

    Args:
        path: A safetensors file, an index, or a folder with model.safetensors or with shards and their index.

    Returns:
        A mapping of names to tensors.

    Raises:
        TypeError: If `path` is not a path.
        ValueError: If there are no weights, a file is damaged, or an index names a file or a tensor that is missing.
            The message names the file or tensor.
        ImportError: If the extra `files` is not installed.

    Example:
        >>> import torch
        >>> import tempfile
        >>> import dynlora_fn as dl
        >>> folder = tempfile.mkdtemp()
        >>> dl.interop.save_weights({"w": torch.ones(2)}, f"{folder}/model.safetensors")
        >>> open_weights(folder)["w"]
        tensor([1., 1.])
    """
    check_path("path", path)
    path = Path(path)
    if path.is_dir() and not (path / SINGLE).is_file() and (path / INDEX).is_file():
        return Weights(_indexed(path / INDEX))
    file = path / SINGLE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"`path` has no {SINGLE} or {INDEX} in {str(path)!r}; pass a folder with one of them, or a file"
        )
    if file.name.endswith(_END_OF_INDEX):
        return Weights(_indexed(file))
    return Weights(dict.fromkeys(_names(file), file))


def _indexed(index: Path) -> dict[str, Path]:
    folder, files = index.parent, read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(map(_is_file_name, files.values())):
        raise ValueError(
            f"{index.name} has {files!r:.80} as `weight_map`; map names of tensors to names of files in its folder"
        )
    names: dict[str, set[str]] = defaultdict(set)
    for name, file in files.items():
        names[file].add(name)
    for file in sorted(names):
        if not (folder / file).is_file():
            raise ValueError(f"{index.name} names the file {file!r}, which is not in its folder; add the file")
        if missing := names[file].difference(_names(folder / file)):
            raise ValueError(
                f"{index.name} names the tensor {sorted(missing)[0]!r}, which is not in {file!r}; write both again"
            )
    return {name: folder / file for name, file in files.items()}


def _is_file_name(value: object) -> bool:
    """Return whether a value is a file name without a folder.

    Other values would let an index point outside its folder.
    """
    return isinstance(value, str) and value not in ("", "..") and Path(value).name == value


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ValueError: If the file does not contain a JSON object. The message names the file.
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
        return package.safe_open(file, framework="pt", backend="pread")
    except package.SafetensorError as error:
        raise ValueError(
            f"`path` is not a complete safetensors file: {str(file)!r} ({error}); write it again"
        ) from error
