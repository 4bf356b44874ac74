"""Compare loss, memory, traffic and time over methods, ranks and precisions.

The tables mark a row as unbeaten if all rows with the same or less memory, traffic or time have more loss.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from bench.quality.experiments import LOW, Rows, stage_of, sweep
from bench.quality.runs import SIZES, Run
from bench.quality.store import Found
from bench.quality.sweeps import Stage, loss_of

MUON: dict[str, Any] = {"optimizer": "muon", "coefficients": "polar_express_8"}
# LoRA-Muon is arXiv:2606.12921. ReLoRA with coupled steps is near sMuon in ReLoRA (arXiv:2608.14492). Spectron
# (arXiv:2602.12429) trains factors without a base.
OTHERS: dict[str, dict[str, Any]] = {
    "full rank, torch.optim.Muon": {"method": "torch_muon"},
    "GaLore, d/4": {"method": "galore"},
    "APOLLO, d/4": {"method": "apollo"},
    "LoRA, d/4": {"method": "lora"},
    "LoRA-Muon, d/4": {"method": "lora", **MUON},
    "ReLoRA, coupled Muon, d/4": {"method": "relora", **MUON, "coupled": 1},
    "Spectron, d/4": {"method": "spectron"},
    "Spectron, d/2": {"method": "spectron", "fraction": 2},
}
# Full rank needs a residual. Bases under factors need none if they are folded rarely.
FOUR_BITS: dict[str, dict[str, Any]] = {
    "full": {**LOW, "base": "nf4+bfloat16"},
    "switchlora": {**LOW, "base": "nf4", "every": 20, "factors": "bfloat16"},
}
# Times of steps over full-rank AdamW's, from `bench.step_by_method --methods muon --fractions 4 8 --json`.
TIMES = "step_sides_*.json"


def frontier(found: Found, size: str, choose: Callable[[Found, Run], Stage] = sweep) -> Rows:
    """Return the rows of full rank, of switched factors and of other methods.

    Full rank and switched factors are also in low precision, with the rates of the same row in float32. "Muon" has the
    coefficients of Polar Express here.

    Args:
        found: The runs so far.
        size: The size of the model.
        choose: A function that returns the runs of a row with the best rates.
    """
    rows = {name: choose(found, run) for name, run in (rows_of_size(size) | others_of_size(size)).items()}
    low = {name: [replace(run, **LOW) for run in rows[name].runs] for name in rows_of_size(size)}
    return rows | {f"{name}, low precision": stage_of(found, runs) for name, runs in low.items() if runs}


def rows_of_size(size: str) -> dict[str, Run]:
    """Return a run of each row of full rank and of switched factors, in float32.

    Its rates are not set.
    """
    full, switched = Run(size, "full"), Run(size, "switchlora")
    rows = {
        "full rank": full,
        "full rank, beta2 0.99": replace(full, beta2=0.99),
        "full rank, Muon": replace(full, **MUON),
        "switched, d/4": switched,
    }
    rows |= {f"switched, Muon, d/{fraction}": replace(switched, fraction=fraction, **MUON) for fraction in (8, 4, 2)}
    one_side = replace(switched, trained="b", **MUON)
    return rows | {f"one side, Muon, d/{fraction}": replace(one_side, fraction=fraction) for fraction in (4, 2, 1)}


def others_of_size(size: str) -> dict[str, Run]:
    """Return a run of each row of the other methods. Its rates are not set."""
    return {name: replace(Run(size, "full"), **settings) for name, settings in OTHERS.items()}


def recorded(found: Found, size: str) -> Rows:
    """Return the rows of `frontier` from recorded runs only.

    Each row has the rates with the lowest mean loss among those that ran with two seeds or more. The coefficients of
    Muon are those of Polar Express or of Jordan, whichever is better.
    """
    rows = rows_of_size(size)
    low = {f"{name}, low precision": replace(run, **LOW) for name, run in rows.items()}
    small = {f"{name}, 4 bits": replace(run, **FOUR_BITS[run.method]) for name, run in rows.items()}
    every = {**rows, **low, **small, **others_of_size(size)}
    return {name: best_recorded(found, run) for name, run in every.items()}


def best_recorded(found: Found, run: Run) -> Stage:
    """Return the recorded runs with the best rates and coefficients."""
    by_rates: dict[Run, list[Run]] = defaultdict(list)
    for other in found:
        if other.method != run.method:
            continue
        rates = replace(run, lr=other.lr, dense_lr=other.dense_lr, coefficients=other.coefficients)
        if replace(rates, seed=other.seed) == other:
            by_rates[rates].append(other)
    repeated = [runs for runs in by_rates.values() if len(runs) > 1]
    return Stage([], min(repeated, key=lambda runs: mean(loss_of(found, run) for run in runs), default=[]))


def step_times(folder: Path) -> dict[str, float]:
    """Return times of steps over full-rank AdamW's, by the names of rows.

    If several files have a row, the time is from the last by name.
    """
    times: dict[str, Any] = {}
    for path in sorted(folder.glob(TIMES)):
        times |= json.loads(path.read_text())
    names = {name: name for name in ("full rank", "full rank, Muon", "full rank, torch.optim.Muon")}
    names |= {"switched, d/4": "switched", "LoRA, d/4": "LoRA"}
    names |= {"switched, Muon, d/4": "switched, Muon"}
    names |= {f"switched, Muon, d/{fraction}": f"switched, Muon at d/{fraction}" for fraction in (8, 2)}
    names |= {f"one side, Muon, d/{fraction}": f"one side, Muon at d/{fraction}" for fraction in (4, 2, 1)}
    return {row: times[name] for row, name in names.items() if name in times}


class Point(NamedTuple):
    """The loss and the costs of a row."""

    name: str
    loss: float
    memory: int  # bytes of weights, gradients and state
    sent: int  # bytes in a data-parallel step
    time: float | None  # of a step over full-rank AdamW's, or None if it was not measured


def points_of(found: Found, rows: Rows, times: Mapping[str, float]) -> list[Point]:
    """Return the points of the rows that have run with all seeds without diverging."""
    result = []
    for name, stage in rows.items():
        lines = [found[run] for run in stage.runs if run in found and found[run]["loss"] is not None]
        if stage.runs and not stage.missing and len(lines) == len(stage.runs):
            run = stage.runs[0]
            loss, stored = mean(line["loss"] for line in lines), memory(run, lines[0])
            result.append(Point(name, loss, stored, run.sent_bytes(), times.get(name)))
    return result


def memory(run: Run, line: Mapping[str, Any]) -> int:
    """Return the bytes of weights, gradients and optimizer state.

    Embedding, head and norms are in float32.
    """
    size, measured = SIZES[run.size], line["bytes"]
    bases = measured.get("bases", 4 * size.parameters())
    return bases + measured.get("factors", 0) + 4 * size.rest() + run.sent_bytes() + measured["state"]


def unbeaten(points: list[Point], cost: str) -> list[Point]:
    """Return the points that have less loss than all points of the same or less cost.

    Points whose cost was not measured are left out.
    """
    measured = [point for point in points if getattr(point, cost) is not None]
    by_cost = sorted(measured, key=lambda point: (getattr(point, cost), point.loss))
    kept: list[Point] = []
    for point in by_cost:
        if not kept or point.loss < kept[-1].loss:
            kept.append(point)
    return kept


COSTS = {
    "memory": "bytes of weights, gradients and state",
    "sent": "bytes sent in a data-parallel step",
    "time": "time of a step over full-rank AdamW's",
}


def write_frontier(folder: Path, name: str, found: Found, by_size: Mapping[str, Rows]) -> None:
    """Write NAME.md with a table of each size, and plots of each size."""
    parts, times = [f"# `python -m bench.quality {name}`", ""], step_times(folder.parent)
    for size, rows in by_size.items():
        points = points_of(found, rows, times)
        if not points:
            continue
        parts += [f"## {size}: {SIZES[size].parameters():,} parameters without embedding and head", ""]
        parts += [*table_of(points, found, rows), "", f"![frontier]({name}_{size}.png)", ""]
        plot(points, folder / f"{name}_{size}.png")
    (folder / f"{name}.md").write_text("\n".join(parts))


def table_of(points: list[Point], found: Found, rows: Rows) -> list[str]:
    """Return the lines of a table. A star marks costs at which a row is not beaten."""
    best = {cost: {point.name for point in unbeaten(points, cost)} for cost in COSTS}
    lines = ["| | rates | loss | by seed | memory, kB | sent, kB | time |", "|---|---|---|---|---|---|---|"]
    for point in sorted(points, key=lambda point: point.loss):
        runs = rows[point.name].runs
        losses = ", ".join(f"{loss_of(found, run):.3f}" for run in runs)
        stars = {cost: " *" if point.name in best[cost] else "" for cost in COSTS}
        cells = [
            f"{runs[0].lr:.3g}, {runs[0].lr * runs[0].dense_lr:.3g}",
            f"{point.loss:.4f}",
            losses,
            f"{point.memory / 1e3:,.0f}{stars['memory']}",
            f"{point.sent / 1e3:,.0f}{stars['sent']}",
            "" if point.time is None else f"{point.time:.2f}{stars['time']}",
        ]
        lines.append(f"| {point.name} | " + " | ".join(cells) + " |")
    return lines


_MARKERS = {True: "sDP", False: "o^v"}  # of full rank, and of factors, for each ten methods
_FILLINGS = {"low precision": "none", "4 bits": "left"}  # of markers; those of float32 are full


def _style_of(name: str, names: list[str]) -> dict[str, str]:
    """Return a style whose filling depends on the precision, and whose color does not."""
    methods = [other for other in names if other.rpartition(", ")[2] not in _FILLINGS]
    start, _, precision = name.rpartition(", ")
    method = start if precision in _FILLINGS else name
    ten, color = divmod(methods.index(method) if method in methods else len(methods), 10)
    return {
        "color": f"C{color}",
        "marker": _MARKERS[name.startswith("full rank")][ten],
        "fillstyle": _FILLINGS.get(precision, "full"),
        "label": name,
    }


def plot(points: list[Point], path: Path) -> None:
    """Plot the loss over each cost.

    A line goes through the points that are not beaten.
    """
    from matplotlib import pyplot  # noqa: PLC0415, slow to import

    costs = [cost for cost in COSTS if any(getattr(point, cost) is not None for point in points)]
    figure, axes = pyplot.subplots(1, len(costs), figsize=(7.5 * len(costs), 6), layout="constrained", sharey=True)
    for axis, cost in zip(axes, costs, strict=True):
        line = unbeaten(points, cost)
        axis.step([getattr(point, cost) for point in line], [point.loss for point in line], where="post", color="0.7")
        for point in points:
            at, style = getattr(point, cost), _style_of(point.name, [each.name for each in points])
            axis.plot([] if at is None else [at], [] if at is None else [point.loss], linestyle="", **style)
        axis.set(xlabel=COSTS[cost], xscale="linear" if cost == "time" else "log")
    axes[0].set(ylabel="loss, nats per byte")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
