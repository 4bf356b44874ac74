"""Write checkpoints of a training state as safetensors files with checksums."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynlora_fn._core._check import check_integer, check_path
from dynlora_fn.interop._agree import Members, members_of
from dynlora_fn.interop._checkpoint_folder import (
    UNFINISHED,
    checked_settings,
    checked_step,
    is_folder,
    newest_first,
    restore_replaced,
)
from dynlora_fn.interop._checkpoint_read import DESCRIPTION, OFFSETS
from dynlora_fn.interop._checkpoint_state import Contents, contents_of
from dynlora_fn.interop._checksums import join_sums, record_sum, sync_folder
from dynlora_fn.interop._lazy import lazy
from dynlora_fn.interop._save import write
from dynlora_fn.parallel._check_replicas import check_replicas
from dynlora_fn.parallel._group import Group


def save_checkpoint(
    state: Any,
    folder: Path | str,
    *,
    step: int,
    settings: Mapping[str, Any] | None = None,
    keep: int | None = None,
    group: "Group | None" = None,
) -> None:
    """Write a checkpoint of a state, which `load_checkpoint` reads bit for bit.

    It is the folder ``step-NNNNNNNN`` in `folder`. It appears complete, by renaming, once all of it is on the disk.
    After an error nothing is left behind, and older checkpoints are unchanged. The files are safetensors with SHA-256
    sums, and nothing in them is pickled. The sums cover the step and the settings too.

    With a group, each process writes one file. Shards are stored by their place in the unsharded tensor. Everything
    else is stored once, after `check_replicas`. So any number of processes can load the checkpoint, except that 8-bit
    moments of sharded factors need the same number. Collective with a group: call it on every process.

    Args:
        state: A tree of tensors, numbers, texts and None, such as parameters, the states of optimizers, and
            ``torch.get_rng_state()``. Only one run may write to a folder.
        folder: The folder of all checkpoints, which is created if it does not exist.
        step: The step, from 0 to 99,999,999. An existing checkpoint of this step is replaced.
        settings: Values by name that JSON can store, such as the seed and the learning rate. `load_checkpoint` refuses
            a checkpoint whose values differ. Default None stores no settings.
        keep: How many checkpoints up to this step to keep. Older ones are deleted. Folders with other names, such as
            ``step-best``, are never deleted. Default None keeps all.
        group: The process group, or a mesh of one dimension. Default None means that only this process writes.

    Raises:
        TypeError: If a leaf cannot be stored, such as an object or a tensor of torchao. The message gives its path.
        ValueError: If an argument is out of range, or differs between processes.
        OSError: If the files cannot be written. With a group, every process raises it.
        DriftedError: If processes have different states.
        ImportError: If the extra `files` is not installed.

    Example:
        >>> import tempfile
        >>> import torch
        >>> import dynlora_fn as dl
        >>> folder = tempfile.mkdtemp()
        >>> save_checkpoint({"w": torch.ones(2), "rate": 0.5}, folder, step=3)
        >>> dl.interop.load_checkpoint(folder, {"w": torch.zeros(2), "rate": 0.0}).state
        {'w': tensor([1., 1.]), 'rate': 0.5}
    """
    check_path("folder", folder)
    step, settings = checked_step(step), checked_settings(settings)
    keep = None if keep is None else check_integer("keep", keep, least=1)
    members = members_of(group)
    contents = members.agree(lambda: contents_of("state", state, members))
    assert contents is not None
    if len(set(members.gather(json.dumps((step, settings, keep))))) > 1:
        raise ValueError("`step`, `settings` and `keep` differ between processes; pass the same on every process")
    if members.group is not None:
        check_replicas(state, members.group)
    folder = Path(folder)
    temporary = folder / f".writing-{step:08d}"
    try:
        members.agree(lambda: _prepare(folder, temporary), first_only=True)
        members.agree(lambda: _write(contents, temporary, step, settings, members))
        members.agree(lambda: _finish(temporary, folder / f"step-{step:08d}", keep), first_only=True)
    except BaseException:
        if members.process == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _prepare(folder: Path, temporary: Path) -> None:
    """Create the temporary folder, and delete folders that a killed run has left."""
    folder.mkdir(parents=True, exist_ok=True)
    restore_replaced(folder)
    for unfinished in folder.iterdir():
        if UNFINISHED.fullmatch(unfinished.name) and is_folder(unfinished):
            shutil.rmtree(unfinished)
    temporary.mkdir()


def _write(contents: Contents, temporary: Path, step: int, settings: dict[str, Any], members: Members) -> None:
    count = members.world_size
    name = "state.safetensors" if count == 1 else f"state-{members.process + 1:05d}-of-{count:05d}.safetensors"
    pieces = {path: contents.pieces[path] for path in _assigned(contents, members)}
    offsets = {path: {"saved_offsets": piece.offsets} for path, piece in pieces.items()}
    description = {"step": step, "settings": settings, "values": contents.values, "constants": contents.constants}
    metadata = {OFFSETS: json.dumps(offsets), DESCRIPTION: json.dumps(description)}
    write({path: lazy(piece.tensor) for path, piece in pieces.items()}, temporary / name, metadata=metadata)
    record_sum(temporary / name)


def _assigned(contents: Contents, members: Members) -> list[str]:
    """Return the paths that this process writes.

    These are its shards, and some of the tensors that all processes have. Each of the latter is assigned to the process
    with the fewest bytes so far. Every process computes the same assignment, so nothing is sent.
    """
    paths, loads = [], [0] * members.world_size
    for path, piece in contents.pieces.items():
        process = members.process
        if not piece.is_shard:
            process = loads.index(min(loads))
            loads[process] += piece.tensor.nbytes
        if process == members.process:
            paths.append(path)
    return paths


def _finish(temporary: Path, target: Path, keep: int | None) -> None:
    """Rename the folder once it is complete, then delete old checkpoints."""
    folder = target.parent
    join_sums(temporary)
    sync_folder(temporary)
    replaced = folder / f".replaced-{target.name.removeprefix('step-')}"
    if (target.exists() or target.is_symlink()) and not is_folder(target):
        raise FileExistsError(f"{str(target)!r} is not a folder; move it away")
    if target.exists():
        target.rename(replaced)
    try:
        temporary.rename(target)
    except OSError:
        if replaced.exists():
            replaced.rename(target)
        raise
    sync_folder(folder)
    old = [path for path in newest_first(folder) if is_folder(path) and path <= target]
    for path in old[keep:] if keep else []:
        shutil.rmtree(path)
    if replaced.exists():
        shutil.rmtree(replaced)
