"""Write files that survive a crash, and checksums that show damage."""

import hashlib
import os
from pathlib import Path

from models.pretrain.processes import Processes

SUMS = "SHA256SUMS"  # in the format of `sha256sum --check`


def record_sum(path: Path) -> None:
    """Wait until the disk has a file, and write its line of `SUMS` to a file beside it, for `join_sums`."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())
    write_durably(Path(f"{path}.sum"), f"{_digest(path)}  {path.name}\n".encode())


def join_sums(folder: Path) -> None:
    """Replace the files with one line each by `SUMS`."""
    parts = sorted(folder.glob("*.sum"))
    write_durably(folder / SUMS, b"".join(part.read_bytes() for part in parts))
    for part in parts:
        part.unlink()


def find_damage(folder: Path, processes: Processes) -> str | None:
    """Return what is wrong with the files that this process checks, or None.

    The processes divide the files.
    """
    try:
        sums = dict(reversed(line.split("  ")) for line in (folder / SUMS).read_text().splitlines())
        files = sorted(file.name for file in folder.iterdir() if file.name != SUMS)
        if files != sorted(sums):
            return f"its files are not those in {SUMS}: {sorted(sums.keys() ^ set(files))[:4]}"
        checked = files[processes.process :: processes.world_size]
        damaged = [name for name in checked if sums[name] != _digest(folder / name)]
        return f"the checksum of {damaged[0]} does not match" if damaged else None
    except (OSError, ValueError) as error:
        return str(error)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder.

    A renaming then survives a crash.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
