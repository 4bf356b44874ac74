"""Write and read the metrics file of a run, and show its progress."""

import json
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

from models.pretrain.stopping import naming

_SECONDS_BETWEEN_LINES = 30.0


class MetricsFile:
    """The file metrics.jsonl, which has a line with a JSON object for each step.

    The lines contain no times, so that equal runs write equal files.
    """

    def __init__(self, path: Path, first_step: int):
        """Open the file, and remove the lines of steps after `first_step`.

        A killed run may have written such lines after its last checkpoint.
        """
        self._path = path
        lines = read_metrics(path, up_to=first_step)
        temporary = path.with_suffix(".writing")
        with naming(temporary):
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        temporary.rename(path)

    def append(self, lines: list[dict[str, Any]]) -> None:
        """Append lines, and wait until they are on the disk."""
        with naming(self._path), self._path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())


def read_metrics(path: Path, *, up_to: int | None = None) -> list[dict[str, Any]]:
    """Return the lines of a metrics file up to a step, by default all.

    An incomplete last line is left out. A missing file has no lines.

    Raises:
        ValueError: If another line is not a JSON object with a step. The message names the file and the line.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    metrics = [_parse(line, path, line_number) for line_number, line in enumerate(lines, start=1)]
    return [line for line in metrics if up_to is None or line["step"] <= up_to]


def _parse(line: bytes, path: Path, line_number: int) -> dict[str, Any]:
    try:
        metrics = json.loads(line)
    except (ValueError, RecursionError):
        metrics = None
    if not isinstance(metrics, dict) or not isinstance(metrics.get("step"), int):
        raise ValueError(
            f"metrics must be JSON objects with a step, got {line[:60]!r} in line {line_number} of {str(path)!r}"
        )
    return metrics


class ProgressBar:
    """A live progress bar in a terminal, or lines elsewhere.

    A line is printed every half a minute and at each validation loss. In a terminal, it is printed only at each
    validation loss.
    """

    def __init__(self, console: Console, steps: int, done: int, status: str = ""):
        self._console, self._steps = console, steps
        self._since = time.monotonic()
        bars = [BarColumn(bar_width=None if console.width > 100 else 12)] if console.width >= 80 else []
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("step"),
            MofNCompleteColumn(table_column=Column(min_width=2 * len(str(steps)) + 1)),
            *bars,  # left out in a narrow terminal, so that the numbers fit
            TimeRemainingColumn(table_column=Column(min_width=len("0:00:00"))),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=steps, completed=done, status=status)

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, step: int, loss: str, validation_loss: str | None, rate: float, seconds_left: float) -> None:
        """Show the progress after a step.

        Args:
            step: The number of steps that are done.
            loss: The training loss as text.
            validation_loss: The validation loss as text. None means that it was not computed.
            rate: Tokens per second.
            seconds_left: An estimate of the time until the last step.
        """
        status = f"loss {loss}, {rate:,.0f} tokens/s"
        self._bar.update(self._task, completed=step, status=status)
        now = time.monotonic()
        is_due = not self._console.is_terminal and now - self._since >= _SECONDS_BETWEEN_LINES
        if validation_loss is None and not is_due:
            return
        self._since = now
        validation = f", validation loss {validation_loss}" if validation_loss else ""
        left = f", {duration(seconds_left)} left" if step < self._steps else ""
        self._console.print(f"step {step}: {status}{validation}{left}", highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Return a time in words, with one or two units."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s" if minutes < 10 and seconds else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def write_start(path: Path, validation_loss: float) -> None:
    """Write the validation loss before the first step.

    It has a separate file, because metrics.jsonl starts with the first step.
    """
    with naming(path):
        path.write_text(json.dumps({"validation_loss": validation_loss}) + "\n")


def read_start(path: Path) -> float | None:
    """Return the validation loss before the first step, or None.

    None means that the file is missing, as in a run of an older version, or damaged.
    """
    try:
        loss = json.loads(path.read_bytes())["validation_loss"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return loss if isinstance(loss, float) else None
