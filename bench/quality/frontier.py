"""Compare loss, memory and traffic over methods, ranks and precisions.

The tables mark a row as unbeaten if all rows with the same or less memory, or traffic, have more loss.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from bench.quality.experiments import Rows, stage_of, sweep
from bench.quality.runs import SIZES, Run
from bench.quality.store import Found

MUON: dict[str, Any] = {"optimizer": "muon", "coefficients": "polar_express_8"}
LOW: dict[str, Any] = {"base": "int8+bfloat16", "moments": "8bit", "gradients": "bfloat16"}


def frontier(found: Found, size: str) -> Rows:
    """Return the rows of full rank, and of switched factors at several ranks.

    Both sides or one side are trained, in float32 and in low precision. A row in low precision has the rates of the
    same row in float32. "Muon" has the coefficients of Polar Express here.
    """
    full, switched = Run(size, "full"), Run(size, "switchlora")
    rows = {
        "full rank": sweep(found, full),
        "full rank, beta2 0.99": sweep(found, replace(full, beta2=0.99)),
        "full rank, Muon": sweep(found, replace(full, **MUON)),
        "switched, d/4": sweep(found, switched),
    }
    for fraction in (8, 4, 2):
        rows[f"switched, Muon, d/{fraction}"] = sweep(found, replace(switched, fraction=fraction, **MUON))
    for fraction in (4, 2, 1):
        run = replace(switched, fraction=fraction, trained="b", **MUON)
        rows[f"one side, Muon, d/{fraction}"] = sweep(found, run)
    low = {name: [replace(run, **LOW) for run in stage.runs] for name, stage in rows.items()}
    return rows | {f"{name}, low precision": stage_of(found, runs) for name, runs in low.items() if runs}


class Point(NamedTuple):
    """The loss and the costs of a row."""

    name: str
    loss: float
    memory: int  # bytes of weights, gradients and state
    sent: int  # bytes in a data-parallel step


def points_of(found: Found, rows: Rows) -> list[Point]:
    """Return the points of the rows that have run with all seeds without diverging."""
    result = []
    for name, stage in rows.items():
        lines = [found[run] for run in stage.runs if run in found and found[run]["loss"] is not None]
        if stage.runs and not stage.missing and len(lines) == len(stage.runs):
            run = stage.runs[0]
            result.append(Point(name, mean(line["loss"] for line in lines), memory(run, lines[0]), run.sent_bytes()))
    return result


def memory(run: Run, line: Mapping[str, Any]) -> int:
    """Return the bytes of weights, gradients and optimizer state.

    Embedding, head and norms are in float32.
    """
    size, measured = SIZES[run.size], line["bytes"]
    bases = measured.get("bases", 4 * size.parameters())
    return bases + measured.get("factors", 0) + 4 * size.rest() + run.sent_bytes() + measured["state"]


def unbeaten(points: list[Point], cost: str) -> list[Point]:
    """Return the points that have less loss than all points of the same or less cost."""
    by_cost = sorted(points, key=lambda point: (getattr(point, cost), point.loss))
    kept: list[Point] = []
    for point in by_cost:
        if not kept or point.loss < kept[-1].loss:
            kept.append(point)
    return kept


def write_frontier(folder: Path, found: Found, by_size: Mapping[str, Rows]) -> None:
    """Write frontier.md with a table of each size, and a plot of each size."""
    parts = ["# `python -m bench.quality frontier`", ""]
    for size, rows in by_size.items():
        points = points_of(found, rows)
        if not points:
            continue
        best = {cost: {point.name for point in unbeaten(points, cost)} for cost in ("memory", "sent")}
        parts += [f"## {size}: {SIZES[size].parameters():,} parameters without embedding and head", ""]
        parts += ["| | loss | weights, gradients, state, kB | | sent a step, kB | |", "|---|---|---|---|---|---|"]
        for name, loss, stored, sent in sorted(points, key=lambda point: point.loss):
            marks = ["unbeaten" if name in best[cost] else "" for cost in ("memory", "sent")]
            parts.append(f"| {name} | {loss:.4f} | {stored / 1e3:,.0f} | {marks[0]} | {sent / 1e3:,.0f} | {marks[1]} |")
        parts += ["", f"![frontier](frontier_{size}.png)", ""]
        plot(points, folder / f"frontier_{size}.png")
    (folder / "frontier.md").write_text("\n".join(parts))


def plot(points: list[Point], path: Path) -> None:
    """Plot the loss over memory and over traffic.

    A line goes through the points that are not beaten.
    """
    from matplotlib import pyplot  # noqa: PLC0415, slow to import

    figure, axes = pyplot.subplots(1, 2, figsize=(15, 6), layout="constrained", sharey=True)
    titles = {"memory": "bytes of weights, gradients and state", "sent": "bytes sent in a data-parallel step"}
    for axis, (cost, title) in zip(axes, titles.items(), strict=True):
        line = unbeaten(points, cost)
        axis.step([getattr(point, cost) for point in line], [point.loss for point in line], where="post", color="0.7")
        for index, point in enumerate(points):
            marker = "s" if point.name.startswith("full rank") else "o"
            axis.plot(getattr(point, cost), point.loss, marker, color=f"C{index % 10}", label=point.name)
        axis.set(xlabel=title, xscale="log")
    axes[0].set(ylabel="loss, nats per byte")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
