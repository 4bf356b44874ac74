"""Checkpoints that are whole or refused, written by all processes in the background: safetensors and their checksums in
a folder that appears at once.

All on `torch.distributed.checkpoint` with its storage for safetensors: what four processes saved, three can load, and
no file holds a pickled object.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor
from torch.distributed import ProcessGroup, checkpoint
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.futures import Future as Written
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

import dynlora_fn as dl
from models.pretrain.ranks import Ranks

_SUMS = "SHA256SUMS"


class SaveError(ValueError):
    """A checkpoint could not be written; older ones are as they were."""


class Loaded(NamedTuple):
    state: Any
    step: int
    refused: list[str]  # newer checkpoints that are damaged, each with the reason


class Saver:
    """Writes checkpoints while training goes on, one at a time."""

    def __init__(self, folder: Path, ranks: Ranks, *, keep: int):
        self._folder, self._ranks, self._keep = folder, ranks, keep
        self._group: ProcessGroup | None = ranks.background_group()
        self._pending: tuple[int, Future[Any]] | None = None
        if ranks.is_first:  # what a run that was killed has left
            for unfinished in folder.glob(".writing-*"):
                shutil.rmtree(unfinished)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """What all processes end with alike leaves no checkpoint half written."""
        if kind is None or issubclass(kind, ValueError | dl.parallel.DriftedError):
            self.finish()

    def start(self, step: int, state: Any) -> None:
        """Copies the state and returns; it is written to ``folder/step-NNNNNNNN`` under a temporary name, which is
        changed once every process has written its part and the disk has it. Of the older ones the newest are kept.

        Raises:
            SaveError: if the one before could not be written.
        """
        self.finish()
        writer = _Writer(self._folder, step, self._ranks.size, keep=self._keep)
        started = checkpoint.async_save(_named(state), storage_writer=writer, process_group=self._group)
        assert isinstance(started, Future)
        self._pending = step, started

    def finish(self) -> None:
        """Waits until what has been started is on the disk.

        Raises:
            SaveError: if it could not be written; on all processes alike.
        """
        if self._pending is None:
            return
        (step, started), self._pending = self._pending, None
        try:
            started.result()
        except (CheckpointException, OSError) as error:
            if self._ranks.is_first:
                shutil.rmtree(_temporary(self._folder, step), ignore_errors=True)
            raise SaveError(f"the checkpoint of step {step} could not be written: {_reason(error)}") from error


def load_checkpoint(folder: Path, template: Any, ranks: Ranks) -> Loaded | None:
    """The newest checkpoint that is whole, or None if there is none at all.

    Args:
        folder: where checkpoints lie.
        template: a state of the same structure, shapes and dtypes, whose values are not used.
        ranks: which share the reading; as many as there were or others.

    Raises:
        ValueError: if there are checkpoints and all are damaged; it names them.
    """
    refused: list[str] = []
    for path in _newest_first(folder):
        if problem := ranks.first_of(_damage(path, ranks)) or ranks.first_of(_misfit(path, template)):
            refused.append(f"{path}: {problem}")
            continue
        state = tree_map(lambda leaf: leaf.clone(), template)
        checkpoint.load(_named(state), storage_reader=checkpoint.HuggingFaceStorageReader(str(path)))
        return Loaded(state, int(path.name.removeprefix("step-")), refused)
    if refused:
        raise ValueError(f"`resume` must find a whole checkpoint, got damaged ones only: {'; '.join(refused)}")
    return None


def _damage(path: Path, ranks: Ranks) -> str | None:
    """What is wrong with the files that are this process's to look through."""
    try:
        sums = dict(reversed(line.split("  ")) for line in (path / _SUMS).read_text().splitlines())
        files = sorted(file.name for file in path.iterdir() if file.name != _SUMS)
        if files != sorted(sums):
            return f"it holds other files than it did: {sorted(sums.keys() ^ set(files))[:4]}"
        bad = [name for name in files[ranks.rank :: ranks.size] if sums[name] != _sum(path / name)]
        return f"the checksum of {bad[0]} does not match" if bad else None
    except (OSError, ValueError) as error:
        return str(error)


def _misfit(path: Path, template: Any) -> str | None:
    """What is wrong with the names, shapes and dtypes."""
    try:
        saved = checkpoint.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except (OSError, ValueError, SafetensorError) as error:
        return str(error)
    wanted = _named(template)
    if saved.keys() != wanted.keys():
        return f"it holds other tensors: {sorted(saved.keys() ^ wanted.keys())[:4]}"
    for name, leaf in wanted.items():
        have = saved[name]
        assert isinstance(have, TensorStorageMetadata)
        if (have.size, have.properties.dtype) != (leaf.shape, leaf.dtype):
            got = f"{tuple(have.size)} {have.properties.dtype}"
            return f"{name} is {got} instead of {tuple(leaf.shape)} {leaf.dtype}"
    return None


class _Writer(checkpoint.HuggingFaceStorageWriter):
    """One file for each process, its checksum beside it, and a name for the whole once all have written."""

    def __init__(self, folder: Path, step: int, size: int, *, keep: int):
        super().__init__(str(_temporary(folder, step)), save_distributed=True)
        self._folder, self._step, self._size, self._keep = folder, step, size, keep

    def write_data(self, plan: Any, planner: Any) -> Written[list[Any]]:
        number = plan.storage_data["shard_index"]
        name = "state.safetensors" if self._size == 1 else f"state-{number:05d}-of-{self._size:05d}.safetensors"
        tensors = {item.index.fqn: planner.resolve_data(item).detach().cpu().contiguous() for item in plan.items}
        offsets = {item.index.fqn: {"saved_offsets": item.tensor_data.chunk.offsets} for item in plan.items}
        # One entry, as the reader wants it: the order of several is not fixed, and equal states make equal files.
        content = save(tensors, metadata={"DCP_SHARDING_INFO": json.dumps(offsets)})
        _write(Path(self.path) / name, content)
        _write(Path(self.path) / f"{name}.sum", f"{hashlib.sha256(content).hexdigest()}  {name}\n".encode())
        written: Written[list[Any]] = Written()
        written.set_result([])
        return written

    def finish(self, metadata: Any, results: Any) -> None:
        """By one process, once all have written."""
        path, target = Path(self.path), self._folder / f"step-{self._step:08d}"
        sums = sorted(path.glob("*.sum"))
        _write(path / _SUMS, b"".join(one.read_bytes() for one in sums))  # in the format of `sha256sum --check`
        for one in sums:
            one.unlink()
        shutil.rmtree(target, ignore_errors=True)  # of an undone future: a run that was resumed from before it
        path.rename(target)
        _sync(self._folder)
        for old in _newest_first(self._folder)[self._keep :]:
            shutil.rmtree(old)


def _named(state: Any) -> dict[str, Tensor]:
    return dict(_leaves(dl.parallel.as_dtensors(state)))


def _leaves(tree: Any) -> Iterator[tuple[str, Tensor]]:
    return ((keystr(key), leaf) for key, leaf in tree_flatten_with_path(tree)[0])


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True)


def _temporary(folder: Path, step: int) -> Path:
    return folder / f".writing-{step:08d}"


def _reason(error: Exception) -> str:
    """Of the first process that failed, without the traceback that comes with it."""
    failures = error.failures if isinstance(error, CheckpointException) else {0: (error,)}
    return "; ".join(dict.fromkeys(str(failure[0]) for failure in failures.values()))


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
