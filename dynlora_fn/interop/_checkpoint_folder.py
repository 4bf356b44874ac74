"""The names of checkpoints in their folder, and checks of steps and settings."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynlora_fn._core._check import check_integer, described
from dynlora_fn.interop._checksums import SUMS

CHECKPOINT, UNFINISHED = re.compile(r"step-[0-9]{8}"), re.compile(r"\.(writing|replaced)-[0-9]{8}")
_LARGEST_STEP = 10**8 - 1


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder, and not a link to one."""
    return path.is_dir() and not path.is_symlink()


def newest_first(folder: Path) -> list[Path]:
    """Return the paths that have the name of a checkpoint, the largest step first."""
    return sorted((path for path in folder.glob("step-*") if CHECKPOINT.fullmatch(path.name)), reverse=True)


def restore_replaced(folder: Path) -> None:
    """Put back checkpoints that a killed run has moved away, but not replaced."""
    for path in folder.glob(".replaced-*"):
        target = folder / f"step-{path.name.removeprefix('.replaced-')}"
        if UNFINISHED.fullmatch(path.name) and (path / SUMS).is_file() and not target.exists():
            path.rename(target)


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint."""
    return int(path.name.removeprefix("step-"))


def checked_step(step: Any) -> int:
    """Return a step as a Python number, and raise if it does not fit into a name.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is negative or has more than eight digits.
    """
    plain = check_integer("step", step, least=0)
    if plain > _LARGEST_STEP:
        raise ValueError(f"`step` is {step}; use an integer of at most {_LARGEST_STEP}")
    return plain


def checked_settings(settings: Any) -> dict[str, Any]:
    """Return settings as they come back from JSON, so that they can be compared.

    A tuple becomes a list, for example. None becomes an empty dict.

    Raises:
        TypeError: If it is not a dict by name, or JSON cannot store a value.
    """
    if settings is None:
        return {}
    if not isinstance(settings, Mapping) or not all(isinstance(name, str) for name in settings):
        raise TypeError(f"`settings` is {described(settings)}; pass a dict of values by name")
    plain: dict[str, Any] = {}
    for name, value in sorted(settings.items()):
        try:
            plain[name] = json.loads(json.dumps(value, sort_keys=True))
        except (TypeError, ValueError) as error:
            raise TypeError(f"`settings` has {described(value)} for {name!r}; use what JSON can store") from error
    return plain
