"""The folder of a run, and the record of its options."""

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from models.pretrain.config import Config
from models.pretrain.progress import read_metrics
from models.pretrain.stopping import naming

# Options that config.json records but checkpoints do not, beside `Config.free_to_change`.
_NOT_IN_CHECKPOINTS = ("tokenizer", "device", "compile")

_TEMPORARY = "config.writing"
ENCODING = ".encoding"  # the folder of tokens that are not complete

ConfigT = TypeVar("ConfigT", bound=Config)


def run_folder(config: Config) -> Path:
    """Return the option `out`, or by default a name with the time and the method."""
    return config.output.out or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{config.training.method}"


def resume_after_restart(config: ConfigT) -> ConfigT:
    """Return the options for processes that `torchrun` has restarted.

    They resume the run if it has written config.json before the restart. Otherwise they start it.

    Raises:
        ValueError: If `out` is not given, so that the folder is unknown, or if config.json is damaged.
    """
    out = config.output.out
    if out is None:
        raise ValueError("`out` must be given to continue after a process has failed, got none; pass --out")
    if not (out / "config.json").is_file():
        return config
    compiles = bool(_read(out / "config.json").get("compile"))  # the choice that was made for this run
    machine = replace(config.machine, compile=compiles)
    return replace(config, machine=machine, output=replace(config.output, resume=True))


def check_folder(config: Config, folder: Path) -> None:
    """Check that a folder can take the run, before the text of the run is read.

    Raises:
        ValueError: If the name is not in UTF-8, a new run would get a folder that is not empty, or the folder of a
            resumed run has no config.json.
        OSError: If the folder cannot be read, or could not be created.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"`out` must be a name in UTF-8, got {str(folder)!a}") from error
    if config.output.resume:
        if not (folder / "config.json").is_file():
            raise ValueError(f"`out` must contain a run to resume, got {str(folder)!r} without config.json")
    elif folder.exists() and (
        not folder.is_dir() or {entry.name for entry in folder.iterdir()} - {_TEMPORARY, ENCODING}
    ):
        raise ValueError(f"`out` must be new or empty, or come with --resume, got {str(folder)!r}, which is not empty")
    parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(parent))
    if not os.access(parent, os.W_OK):
        raise PermissionError(errno.EACCES, "the folder cannot be written", str(parent))


def prepare_folder(config: Config, folder: Path, digests: Mapping[str, str]) -> int:
    """Create the folder of a new run, or check the options of a resumed run.

    config.json records each option as one entry, without the groups of `Config`.

    Args:
        config: The options.
        folder: The folder of the run.
        digests: Hashes of the files that options name, by the names of the entries.

    Returns:
        The option `steps`. For a resumed run, it is the value in config.json before this command.

    Raises:
        ValueError: As `check_folder`, or if the options differ from config.json. Nothing in the folder is changed.
        OSError: If the folder cannot be read or written.
    """
    check_folder(config, folder)
    if config.output.resume:
        old = _with_defaults(_read(folder / "config.json"), config)
        _check_same(old, _record(config, digests), config, folder)
        steps = old["steps"]
        if type(steps) is not int or steps < 1:
            raise ValueError(f"`resume` must find a number of steps in {str(folder / 'config.json')!r}, got {steps!r}")
        return steps
    folder.mkdir(parents=True, exist_ok=True)
    write_record(config, folder, digests)
    return config.training.steps


def write_record(config: Config, folder: Path, digests: Mapping[str, str]) -> None:
    """Record the options in config.json.

    The file appears complete, because it is written under another name first.
    """
    path, temporary = folder / "config.json", folder / _TEMPORARY
    content = json.dumps(_record(config, digests), indent=1) + "\n"
    if path.is_file() and path.read_text() == content:
        return
    with naming(temporary):
        temporary.write_text(content)
    temporary.rename(path)


def checkpoint_settings(config: Config, digests: Mapping[str, str]) -> dict[str, object]:
    """Return the options that must be the same in a checkpoint and in the resumed run."""
    record = _record(config, digests)
    return {name: record[name] for name in record if name not in (*config.free_to_change, *_NOT_IN_CHECKPOINTS)}


def check_metrics(path: Path, step: int, steps: int) -> None:
    """Check that a metrics file has all lines that the end of a resumed run reads.

    Args:
        path: The file.
        step: The step of the checkpoint, after which the run resumes.
        steps: The number of steps of the run.

    Raises:
        ValueError: If a step up to `step` is missing or incomplete. The message names the file and what is missing.
    """
    if (path.exists() or path.is_symlink()) and not path.is_file():
        raise ValueError(f"metrics must be in a regular file, got {str(path)!r}; move it away")
    lines = read_metrics(path, up_to=step)
    for expected, line in enumerate(lines, start=1):
        if line["step"] != expected or not all(_is_number(line.get(name)) for name in ("loss", "switched")):
            raise ValueError(
                f"metrics must have loss and switched vectors of step {expected}, got {str(path)!r} without"
            )
    if len(lines) < step:
        raise ValueError(
            f"metrics must have the steps up to {step} of the checkpoint, got {str(path)!r} with {len(lines)}; "
            "restore the file, or resume from an older checkpoint"
        )
    if step == steps and not _is_number(lines[-1].get("validation_loss")):
        raise ValueError(f"metrics must have the last validation loss, got {str(path)!r} without it at step {step}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _record(config: Config, digests: Mapping[str, str]) -> dict[str, object]:
    options = {name: value for name, value in config.options().items() if name not in config.not_recorded}
    record: dict[str, object] = json.loads(json.dumps(options | digests, default=str))
    return record


def _read(path: Path) -> dict[str, object]:
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`resume` must find the run's options in {str(path)!r}, got invalid JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"`resume` must find the run's options in {str(path)!r}, got {record!r:.80}, not an object")
    return record


def _with_defaults(record: dict[str, object], config: Config) -> dict[str, object]:
    """Return a record with defaults for options that older versions did not have."""
    return _record(type(config)(), {}) | Config.defaults_before | record


def _check_same(old: dict[str, object], new: dict[str, object], config: Config, folder: Path) -> None:
    changes = [
        f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in sorted((old.keys() | new.keys()) - {*config.free_to_change})
        if old.get(name) != new.get(name)
    ]
    if changes:
        raise ValueError(f"`resume` must keep the options recorded in {str(folder)!r}, got: {'; '.join(changes)}")
