"""Write files that survive a crash, and checksums that show damage."""

import hashlib
import os
import stat
from pathlib import Path

SUMS = "SHA256SUMS"  # in the format of `sha256sum --check`


def record_sum(path: Path) -> None:
    """Wait until a file is on the disk, and write its checksum to a file beside it.

    `join_sums` joins these files.
    """
    with path.open("r+b") as file:
        os.fsync(file.fileno())
    _write_durably(Path(f"{path}.sum"), f"{_digest(path)}  {path.name}\n".encode())


def join_sums(folder: Path) -> None:
    """Join the checksum files of `record_sum` into the file `SUMS`, and delete them."""
    parts = sorted(folder.glob("*.sum"))
    _write_durably(folder / SUMS, b"".join(part.read_bytes() for part in parts))
    for part in parts:
        part.unlink()


def find_damage(folder: Path, *, process: int = 0, world_size: int = 1) -> str | None:
    """Return what is wrong with the files that this process checks, or None.

    Each process checks a part of the files. Pipes, links and folders count as damage and are not opened.
    """
    try:
        if folder.is_symlink() or not folder.is_dir():
            return "it is not a folder"
        names = sorted(entry.name for entry in folder.iterdir())
        for name in names:
            if not stat.S_ISREG((folder / name).lstat().st_mode):
                return f"{name} is not a regular file"
        files = [name for name in names if name != SUMS]
        sums = _read_sums(folder / SUMS)
        if files != sorted(sums):
            return f"its files are not those in {SUMS}: {sorted(sums.keys() ^ set(files))[:4]}"
        checked = files[process::world_size]
        damaged = [name for name in checked if sums[name] != _digest(folder / name)]
        return f"the checksum of {damaged[0]} does not match" if damaged else None
    except (OSError, ValueError) as error:
        return str(error)


def _read_sums(path: Path) -> dict[str, str]:
    """Return the checksums by the names of files.

    Raises:
        ValueError: If a line does not have the format of `sha256sum`.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not text: {error}") from error
    sums = {}
    for line in lines:
        digest, separator, name = line.partition("  ")
        if not separator:
            raise ValueError(f"{path.name} has the line {line[:60]!r}, which is not a checksum")
        sums[name] = digest
    return sums


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_durably(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, so renaming survives a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
