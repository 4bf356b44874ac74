"""The metrics file of a run, and its progress bar."""

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class MetricsFile:
    """Write one JSON object per step, one per line.

    Times are left out, so that equal runs write equal files.
    """

    def __init__(self, path: Path, first_step: int):
        """Open the file.

        Lines of later steps than `first_step`, which a killed run may have left, are dropped.
        """
        self._path = path
        lines = read_metrics(path, up_to=first_step)
        temporary = path.with_suffix(".writing")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        temporary.rename(path)

    def append(self, lines: list[dict[str, Any]]) -> None:
        with self._path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())


def read_metrics(path: Path, *, up_to: int | None = None) -> list[dict[str, Any]]:
    """Return the lines of a metrics file up to a step, by default all.

    An incomplete last line is dropped.

    Raises:
        ValueError: If any other line has no metrics. It names the file and the line.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    metrics = [_parse(line, path, line_number) for line_number, line in enumerate(lines, start=1)]
    return [line for line in metrics if up_to is None or line["step"] <= up_to]


def _parse(line: bytes, path: Path, line_number: int) -> dict[str, Any]:
    try:
        metrics = json.loads(line)
    except ValueError:
        metrics = None
    if not isinstance(metrics, dict) or not isinstance(metrics.get("step"), int):
        raise ValueError(
            f"metrics must be JSON objects with a step, got {line[:60]!r} in line {line_number} of {str(path)!r}"
        )
    return metrics


class ProgressBar:
    """Show a live bar in a terminal, elsewhere a line at each validation loss."""

    def __init__(self, console: Console, steps: int, done: int):
        self._console = console
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=steps, completed=done, status="")

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, line: dict[str, Any], tokens_per_second: float, seconds_left: float) -> None:
        status = f"loss {line['loss']:.3f}  {tokens_per_second:,.0f} tokens/s"
        self._bar.update(self._task, completed=line["step"], status=status)
        if "validation_loss" in line:
            text = f"step {line['step']}: {status}, validation loss {line['validation_loss']:.3f}"
            self._console.print(f"{text}, {seconds_left:.0f} s left", highlight=False, soft_wrap=True)
