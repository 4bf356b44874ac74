"""A full disk leaves the older checkpoint and one clear error."""

import contextlib
import resource
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.support.pretrain_processes import arguments, assert_same_run, at_step, job
from tests.support.processes import in_processes


def test_a_full_disk_leaves_the_older_checkpoint_and_one_clear_error(text: Path, tmp_path: Path):
    assert [outcome.code for outcome in in_processes(2, job, arguments(text, tmp_path / "whole"))] == [0, 0]
    _end_at_a_full_disk(text, tmp_path / "limited", tmp_path / "whole", _limit_the_second, "[Errno 27] File too large")
    checkpoints = tmp_path / "run" / "checkpoints"
    if not _can_mount(tmp_path):
        pytest.skip("a separate disk, to be filled, takes the right to mount one")
    fill = partial(_fill_the_disk, checkpoints)
    try:
        _end_at_a_full_disk(text, tmp_path / "run", tmp_path / "whole", fill, "[Errno 28] No space left on device")
    finally:
        subprocess.run(["umount", checkpoints], check=False)


def _end_at_a_full_disk(text: Path, out: Path, uninterrupted: Path, fault: Callable[[int], None], reason: str) -> None:
    given = arguments(text, out, **{"save-every": 10})
    outcomes = in_processes(2, job, given, fault)
    assert [outcome.code for outcome in outcomes] == [2, 2], outcomes
    assert outcomes[1].err == ""
    assert outcomes[0].err.count("\n") == 1
    assert f"the checkpoint of step 20 could not be written: {reason}" in outcomes[0].err
    (out / "checkpoints" / FILLER).unlink(missing_ok=True)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000010"]
    assert [outcome.code for outcome in in_processes(2, job, [*given, "--resume"])] == [0, 0]
    assert_same_run(out, uninterrupted)


def _limit_the_second(process: int) -> None:
    """Limit the file size of the second process, the closest limit of a process to a full disk."""
    if process == 1:
        at_step(15, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)))


FILLER = "filler"


def _mount(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder]
    return subprocess.run(command, check=False, capture_output=True).returncode


def _can_mount(folder: Path) -> bool:
    if shutil.which("mount") is None or _mount(folder / "mounted"):
        return False
    subprocess.run(["umount", folder / "mounted"], check=True)
    return True


def _fill_the_disk(folder: Path, process: int) -> None:
    """Fill a small file system that is mounted for the checkpoints."""
    if process == 0:
        at_step(5, lambda: _mount(folder))
        at_step(15, lambda: _fill(folder / FILLER))


def _fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
