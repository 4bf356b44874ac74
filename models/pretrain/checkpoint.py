"""Write and load checkpoints as safetensors with checksums.

All processes write together, in the background.

A checkpoint is a folder that appears complete, by renaming. One that is damaged is refused. The storage format of
`torch.distributed.checkpoint` is used, so that three processes can load what four saved. No file contains a pickled
object.
"""

import json
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed import ProcessGroup, checkpoint
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.futures import Future as TorchFuture
from torch.utils._pytree import tree_map

import dynlora_fn as dl
from models.pretrain.checkpoint_reader import Reader
from models.pretrain.checksums import find_damage, join_sums, record_sum, sync_folder
from models.pretrain.processes import Processes

_BEFORE_FREEZE_STATE = re.compile(r"(\.opt_state\['\w+'\])\.inner\.")


class SaveError(ValueError):
    """A checkpoint could not be written. Older ones are unchanged."""


class Loaded(NamedTuple):
    state: Any
    step: int
    refused: list[str]  # newer checkpoints that are damaged, each with the reason


class Saver:
    """Write checkpoints while training continues, one at a time."""

    def __init__(self, folder: Path, processes: Processes, *, keep: int):
        self._folder, self._processes, self._keep = folder, processes, keep
        self._group: ProcessGroup | None = processes.background_group()
        self._pending: tuple[int, Future[Any]] | None = None
        if processes.is_first:  # a killed run leaves unfinished checkpoints
            for unfinished in folder.glob(".writing-*"):
                shutil.rmtree(unfinished)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish the pending checkpoint, except after an error of this process only.

        Every process takes part in writing. A ValueError or a DriftedError is raised on all of them.
        """
        if kind is None or issubclass(kind, ValueError | dl.parallel.DriftedError):
            self.finish()

    def start(self, step: int, state: Any) -> None:
        """Copy the state, start to write it to ``folder/step-NNNNNNNN`` and return.

        The copy is one state in memory until it is written, because training changes the state meanwhile. Writing needs
        no further memory, and does not hold the interpreter's lock.

        The folder has a temporary name until every process has written its file to the disk. Then all but the newest
        `keep` checkpoints are deleted.

        Raises:
            SaveError: If the checkpoint before could not be written.
        """
        self.finish()
        writer = _Writer(self._folder, step, self._processes.world_size, keep=self._keep)
        future = checkpoint.async_save(dl.parallel.as_dtensors(state), storage_writer=writer, process_group=self._group)
        assert isinstance(future, Future)
        self._pending = step, future

    def finish(self) -> None:
        """Wait until the pending checkpoint is on the disk.

        Raises:
            SaveError: On every process, if it could not be written.
        """
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        try:
            future.result()
        except (CheckpointException, OSError) as error:
            if self._processes.is_first:
                shutil.rmtree(_temporary(self._folder, step), ignore_errors=True)
            raise SaveError(f"the checkpoint of step {step} could not be written: {_reason(error)}") from error


def load_checkpoint(folder: Path, template: Any, processes: Processes, *, donate: bool = False) -> Loaded | None:
    """Return the newest undamaged checkpoint, or None if there is none. Collective.

    One tensor is in memory beside the state.

    Args:
        folder: The folder of all checkpoints.
        template: A state of the same structure, shapes and dtypes. Its values are not used.
        processes: The processes that read it. There may be more or fewer than have saved it.
        donate: Whether the checkpoint is read into the memory of `template`, which it then replaces. Tensors that share
            memory are copied before. Without a checkpoint, `template` does not change.

    Raises:
        ValueError: If all checkpoints are damaged. It names them.
    """
    refused: list[str] = []
    for path in _newest_first(folder):
        damage = processes.first_not_none(find_damage(path, processes))
        if problem := damage or processes.first_not_none(_find_mismatch(path, template)):
            refused.append(f"{path}: {problem}")
            continue
        state = _distinct(template) if donate else tree_map(torch.empty_like, template)
        reader = Reader(str(path))
        checkpoint.load(
            _named_as(dl.parallel.as_dtensors(state), reader.read_metadata().state_dict_metadata), storage_reader=reader
        )
        return Loaded(state, int(path.name.removeprefix("step-")), refused)
    if refused:
        raise ValueError(f"`resume` must find an undamaged checkpoint, got only damaged ones: {'; '.join(refused)}")
    return None


def _distinct(tree: Any) -> Any:
    """Return the tensors of a tree, with a copy of those that share memory with another or with themselves."""
    addresses: set[int] = set()

    def distinct(leaf: Tensor) -> Tensor:
        address = leaf.untyped_storage().data_ptr()
        is_shared = address in addresses or not leaf.is_contiguous()
        addresses.add(address)
        return leaf.clone() if is_shared else leaf.detach()

    return tree_map(distinct, tree)


def _find_mismatch(path: Path, template: Any) -> str | None:
    """Return which names, shapes or dtypes differ from the template, or None."""
    try:
        saved = checkpoint.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except (OSError, ValueError, SafetensorError) as error:
        return str(error)
    expected = _named_as(dl.parallel.as_dtensors(template), saved)
    if saved.keys() != expected.keys():
        return f"it holds other tensors: {sorted(saved.keys() ^ expected.keys())[:4]}"
    for name, leaf in expected.items():
        metadata = saved[name]
        assert isinstance(metadata, TensorStorageMetadata)
        if (metadata.size, metadata.properties.dtype) != (leaf.shape, leaf.dtype):
            found = f"{tuple(metadata.size)} {metadata.properties.dtype}"
            return f"{name} is {found} instead of {tuple(leaf.shape)} {leaf.dtype}"
    return None


class _Writer(checkpoint.HuggingFaceStorageWriter):
    """Write one file with its checksum per process, then rename the folder."""

    def __init__(self, folder: Path, step: int, world_size: int, *, keep: int):
        super().__init__(str(_temporary(folder, step)), save_distributed=True)
        self._folder, self._step, self._world_size, self._keep = folder, step, world_size, keep

    def write_data(self, plan: Any, planner: Any) -> TorchFuture[list[Any]]:
        index, count = plan.storage_data["shard_index"], self._world_size
        name = "state.safetensors" if count == 1 else f"state-{index:05d}-of-{count:05d}.safetensors"
        tensors = {item.index.fqn: planner.resolve_data(item) for item in plan.items}
        offsets = {item.index.fqn: {"saved_offsets": item.tensor_data.chunk.offsets} for item in plan.items}
        # The reader expects this entry. There is no other, because safetensors does not fix the order of several, and
        # equal states must make equal files.
        path = Path(self.path) / name
        dl.interop.save_weights(tensors, path, metadata={"DCP_SHARDING_INFO": json.dumps(offsets)})
        record_sum(path)
        future: TorchFuture[list[Any]] = TorchFuture()
        future.set_result([])
        return future

    def finish(self, metadata: Any, results: Any) -> None:
        """Rename the folder.

        `torch.distributed.checkpoint` calls this on one process, once all have written.
        """
        path, target = Path(self.path), self._folder / f"step-{self._step:08d}"
        join_sums(path)
        shutil.rmtree(target, ignore_errors=True)  # it exists where the run was resumed from an older checkpoint
        path.rename(target)
        sync_folder(self._folder)
        for old in _newest_first(self._folder)[self._keep :]:
            shutil.rmtree(old)


def _named_as(tensors: dict[str, Tensor], saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors by the names that a checkpoint has for them.

    In older ones the optimizer's states have no `FreezeState` around them: ``.opt_state['rest'].mu`` there is
    ``.opt_state['rest'].inner.mu`` here.
    """
    before = {_BEFORE_FREEZE_STATE.sub(r"\1.", name): tensor for name, tensor in tensors.items()}
    return before if before.keys() == saved.keys() else tensors


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True)


def _temporary(folder: Path, step: int) -> Path:
    return folder / f".writing-{step:08d}"


def _reason(error: Exception) -> str:
    """Return the messages of the processes that failed, without repetitions."""
    failures = error.failures if isinstance(error, CheckpointException) else {0: (error,)}
    return "; ".join(dict.fromkeys(str(failure[0]) for failure in failures.values()))
