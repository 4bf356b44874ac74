"""Measure all rows or one, and print which goals are met."""

import gc
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from bench.growth import billion, calls, files, gradients, names, starting
from bench.growth.measure import medians, peak_of, seconds_of, warm_up
from bench.growth.row import Curves, Row, exponent
from bench.support.harness import Options, finish, run_in_subprocess, start, table
from bench.support.process_memory import MB, RETURN_FREED_MEMORY

ROWS: dict[str, Row] = {**starting.ROWS, **gradients.ROWS, **names.ROWS, **files.ROWS, **calls.ROWS}


@dataclass(frozen=True)
class Growth(Options):
    threads: int = 1
    row: str | None = None
    """Measure only this row."""
    limit: float = 120
    """Seconds after which no further round at a size is started."""
    size: int | None = None
    contender: str | None = None
    """Measure only the peak of this contender of `row` at `size`, in this process, and print it."""
    billion: bool = False
    """Take a llama of 1.09 billion parameters through a whole run, on two threads, instead of measuring the rows."""
    folder: Path | None = None
    """The folder for the files of `billion`, which take 20 GB. Default None means a temporary folder."""
    part: str | None = None
    """Measure only this part of `billion` with the files in `folder`, in this process, and print it."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype of the weights for `part`."""


def main(config: Growth) -> None:
    torch.set_num_threads(config.threads)
    if config.part:
        assert config.folder is not None
        print(json.dumps(billion.measure(config.part, config.dtype, config.folder, config.quick)))
        return
    if config.row and config.row not in ROWS:
        raise SystemExit(f"`row` must be one of {', '.join(ROWS)}, got {config.row!r}")
    if config.contender:
        assert config.row is not None
        assert config.size is not None
        warm_up(ROWS[config.row], [config.contender])  # the first run imports libraries and fills caches
        print(json.dumps(peak_of(ROWS[config.row], config.contender, config.size)))
        return
    console = start(config)
    if config.billion:
        finish(config, *billion.run(console, config.folder, config.quick))
        return
    rows = {config.row: ROWS[config.row]} if config.row else ROWS
    raw, goals = {}, []
    for name, row in rows.items():
        raw[name] = measure(name, row, config)
        report(console, row, raw[name])
        goals += [(name, *goal) for goal in goals_of(row, raw[name])]
    console.print(
        table(
            "goals",
            ["row", "goal", "at most", "found", ""],
            [[name, text, most, found, "met" if found <= most else "not met"] for name, text, most, found in goals],
        )
    )
    exponents = {name: {line: exponent(curve) for line, curve in curves.items()} for name, curves in raw.items()}
    met = {f"{name}: {text}": found for name, text, _, found in goals}
    finish(config, {**exponents, "goals": met, "met": sum(found <= most for *_, most, found in goals)}, raw)


def measure(name: str, row: Row, config: Growth) -> Curves:
    """Return the curves of a row."""
    # Without this, each collection before a run would take half a second for the objects of the libraries.
    gc.freeze()
    sizes = row.quick if config.quick else row.sizes
    if row.kind == "peak":
        of_size = {size: peaks(name, row, size, config) for size in sizes}
        return {line: {size: of_size[size][line] for size in sizes} for line in of_size[sizes[0]]}
    if row.kind == "value":
        return {line: {size: float(make(size).run()) for size in sizes} for line, make in row.contenders.items()}
    if not config.quick:
        warm_up(row, row.contenders)
    rounds = 1 if config.quick else row.rounds
    return medians({size: seconds_of(row, size, rounds, config.limit) for size in sizes})


def peaks(name: str, row: Row, size: int, config: Growth) -> dict[str, float]:
    """Return the peak of each contender, each measured in a separate process.

    With `quick`, they are measured in this process.
    """
    found: dict[str, float] = {}
    for contender in row.contenders:
        if config.quick:
            found |= peak_of(row, contender, size)
            continue
        flags = ["--row", name, "--size", str(size), "--contender", contender, "--threads", str(config.threads)]
        found |= run_in_subprocess("bench.growth", flags, RETURN_FREED_MEMORY)
    return found


def report(console: Console, row: Row, curves: Curves) -> None:
    """Print the curves of a row with their exponents."""
    scale, unit = (MB, "MB") if row.kind == "peak" else (1, {"seconds": "s", "value": ""}[row.kind])
    sizes = list(next(iter(curves.values())))
    rows = [[line, *(curve[size] / scale for size in sizes), exponent(curve)] for line, curve in curves.items()]
    columns = [row.size, *(f"{size:,} {unit}".strip() for size in sizes), "exponent"]
    console.print(table(row.title, columns, rows))


def goals_of(row: Row, curves: Curves) -> Iterator[tuple[str, float, float]]:
    """Yield the text of each goal, its limit, and the measured value."""
    for goal in row.goals:
        yield goal.text, goal.most, goal.value(curves)
