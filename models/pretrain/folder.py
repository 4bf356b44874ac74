"""The folder of a run, and the record of its options."""

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from models.pretrain.config import Config

ConfigT = TypeVar("ConfigT", bound=Config)


def run_folder(config: Config) -> Path:
    """Return `out`, or a name with the time and the method where it is not given."""
    return config.output.out or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{config.training.method}"


def resume_after_restart(config: ConfigT) -> ConfigT:
    """Return the options of restarted processes.

    They resume if the processes before them have begun to write.

    Raises:
        ValueError: If `out` is not given, so that the folder is unknown.
    """
    out = config.output.out
    if out is None:
        raise ValueError("`out` must be given to continue after a process has failed, got none; pass --out")
    return replace(config, output=replace(config.output, resume=(out / "config.json").is_file()))


def prepare_folder(config: Config, folder: Path, digests: Mapping[str, str]) -> None:
    """Create the folder of a new run, or check the options of a resumed one.

    The record in config.json is flat, one entry per option, whatever the groups of `Config` are. `digests` are
    hashes of the files that some options name.

    Raises:
        ValueError: If the folder contains anything else, or other options. Nothing in it is changed.
    """
    record = _record(config, digests)
    path, temporary = folder / "config.json", folder / "config.writing"
    if config.output.resume:
        if not path.is_file():
            raise ValueError(f"`out` must hold a run to resume, got {str(folder)!r} without config.json")
        _check_same(_read(path), record, folder)
    elif folder.exists() and (not folder.is_dir() or any(entry != temporary for entry in folder.iterdir())):
        raise ValueError(f"`out` must be new or empty, or come with --resume, got {str(folder)!r}, which is not empty")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        temporary.rename(path)


def _record(config: Config, digests: Mapping[str, str]) -> dict[str, object]:
    options = {name: value for name, value in config.options().items() if name not in config.free_to_change}
    record: dict[str, object] = json.loads(json.dumps(options | digests, default=str))
    return record


def _read(path: Path) -> dict[str, object]:
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"`resume` must find the run's options in {str(path)!r}, got invalid JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"`resume` must find the run's options in {str(path)!r}, got {record!r:.80}, not an object")
    return record


def _check_same(old: dict[str, object], new: dict[str, object], folder: Path) -> None:
    changes = [
        f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if changes:
        raise ValueError(f"`resume` must keep the options recorded in {str(folder)!r}, got: {'; '.join(changes)}")
