"""Checkpoints that are whole or refused: safetensors and their checksum in a folder that appears at once."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten

KEPT = 2


class Loaded(NamedTuple):
    state: Any
    step: int
    refused: list[str]  # newer checkpoints that are damaged, each with the reason


def save_checkpoint(folder: Path, step: int, state: Any) -> None:
    """Writes ``folder/step-NNNNNNNN`` under a temporary name and renames it; of the older ones, the newest is kept."""
    target, temporary = folder / f"step-{step:08d}", folder / f".writing-{step:08d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    content = save({name: leaf.contiguous().cpu() for name, leaf in _named_leaves(state)})
    _write(temporary / "state.safetensors", content)
    # In the format of `sha256sum --check`.
    _write(temporary / "SHA256SUMS", f"{hashlib.sha256(content).hexdigest()}  state.safetensors\n".encode())
    shutil.rmtree(target, ignore_errors=True)  # of an undone future: a run that was resumed from before it
    temporary.rename(target)
    _sync(folder)
    for old in _newest_first(folder)[KEPT:]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path, template: Any) -> Loaded | None:
    """The newest checkpoint that is whole, or None if there is none at all.

    Args:
        folder: where checkpoints lie.
        template: a state of the same structure, shapes and dtypes, whose values are not used.

    Raises:
        ValueError: if there are checkpoints and all are damaged; it names them.
    """
    refused: list[str] = []
    for path in _newest_first(folder):
        try:
            return Loaded(_read(path, template), int(path.name.removeprefix("step-")), refused)
        except (OSError, ValueError, SafetensorError) as error:
            refused.append(f"{path}: {error}")
    if refused:
        raise ValueError(f"`resume` must find a whole checkpoint, got damaged ones only: {'; '.join(refused)}")
    return None


def _read(path: Path, template: Any) -> Any:
    content = (path / "state.safetensors").read_bytes()
    wanted = (path / "SHA256SUMS").read_text().split()[:1]
    if wanted != [hashlib.sha256(content).hexdigest()]:
        raise ValueError("its checksum does not match")
    tensors = load(content)
    named = dict(_named_leaves(template))
    if tensors.keys() != named.keys():
        raise ValueError(f"it holds other tensors: {sorted(tensors.keys() ^ named.keys())[:4]}")
    for name, leaf in named.items():
        if (tensors[name].shape, tensors[name].dtype) != (leaf.shape, leaf.dtype):
            got = f"{tuple(tensors[name].shape)} {tensors[name].dtype}"
            raise ValueError(f"{name} is {got} instead of {tuple(leaf.shape)} {leaf.dtype}")
    leaves, structure = tree_flatten_with_path(template)
    return tree_unflatten([tensors[keystr(key)].to(leaf.device) for key, leaf in leaves], structure)


def _named_leaves(state: Any) -> Iterator[tuple[str, Tensor]]:
    return ((keystr(key), leaf) for key, leaf in tree_flatten_with_path(state)[0])


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Makes the renaming itself last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
