"""Plot the losses of a run to loss.png."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from models.pretrain.config import Config
from models.pretrain.progress import read_metrics, read_start
from models.pretrain.stopping import naming

mpl.use("agg")
_COLORS = ("tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan")  # of other runs


def title(config: Config) -> str:
    """Return the title of a run's plot."""
    training = config.training
    rank = "" if training.method == "full" else f", rank {config.rank()}"
    return f"{training.model}, {training.method}{rank}"


def plot(
    metrics: list[dict[str, Any]],
    path: Path,
    *,
    before: float | None,
    title: str,
    unigram_loss: float,
    bits_per_nat: float,
    compared: Mapping[str, list[tuple[int, float]]],
) -> None:
    """Plot training and validation loss, and the vectors switched at each step.

    Args:
        metrics: The lines of metrics.jsonl.
        path: The file.
        before: The validation loss before the first step. None means that it is not known.
        title: The title.
        unigram_loss: The validation loss of a unigram model.
        bits_per_nat: The factor from nats per token to bits per byte of the validation text, for the second axis.
        compared: Steps and validation losses of other runs, by the names of the runs.
    """
    from matplotlib import pyplot  # noqa: PLC0415, slow to import

    switched = [(line["step"], line["switched"]) for line in metrics if line["switched"]]
    heights = (4, 1) if switched else (1,)
    figure, rows = pyplot.subplots(
        len(heights), 1, sharex=True, figsize=(8, 5.5), height_ratios=heights, layout="constrained", squeeze=False
    )
    losses = rows[0, 0]
    steps, training = [line["step"] for line in metrics], [line["loss"] for line in metrics]
    losses.plot(steps, training, color="tab:blue", alpha=0.25, linewidth=0.8)
    smooth = smoothed(training)
    losses.plot(steps, smooth, color="tab:blue", label=f"training, smoothed: {smooth[-1]:.3f} at the end")
    points = validation_points(metrics, before)
    if points:
        label = f"validation: {points[-1][1]:.3f} at the end"
        losses.plot(*zip(*points, strict=True), color="tab:orange", marker="o", markersize=4, label=label)
    for color, (name, others) in zip(cycle(_COLORS), compared.items(), strict=False):
        label = f"validation, {_literal(name)}: {others[-1][1]:.3f} at the end"
        losses.plot(*zip(*others, strict=True), color=color, marker=".", markersize=4, linewidth=1, label=label)
    losses.axhline(unigram_loss, color="grey", linestyle="--", label=f"unigram model, validation: {unigram_loss:.3f}")
    losses.set(ylabel="loss (nats per token)", title=_literal(title))
    losses.legend(frameon=False)
    bits = losses.secondary_yaxis("right", functions=(lambda y: y * bits_per_nat, lambda y: y / bits_per_nat))
    bits.set_ylabel("bits per byte")
    if switched:
        rows[1, 0].bar(*zip(*switched, strict=True), width=1.0, color="tab:green")
        rows[1, 0].set(ylabel="vectors\nswitched", ylim=(0, None))
    rows[-1, 0].set(xlabel="step")
    with naming(path):
        figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _literal(text: str) -> str:
    """Return a text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")


def compared_runs(folders: Sequence[Path]) -> dict[str, list[tuple[int, float]]]:
    """Read steps and validation losses of runs, by the names of their folders.

    Raises:
        ValueError: If a folder contains no run with a validation loss.
    """
    runs = {}
    for folder in folders:
        points = validation_points(read_metrics(folder / "metrics.jsonl"), read_start(folder / "start.json"))
        if not points:
            raise ValueError(f"`compare` must name folders of runs with validation losses, got {str(folder)!r}")
        runs[folder.name if folder.name not in runs else str(folder)] = points
    return runs


def smoothed(losses: Sequence[float]) -> list[float]:
    """Return the running means of losses.

    Each mean is over a window of a fiftieth of all losses before and after, which is shorter at the ends.
    """
    half = max(1, len(losses) // 50)
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    places = np.arange(len(losses))
    starts, stops = np.maximum(places - half, 0), np.minimum(places + half + 1, len(losses))
    means: list[float] = ((sums[stops] - sums[starts]) / (stops - starts)).tolist()
    return means


def validation_points(metrics: list[dict[str, Any]], before: float | None) -> list[tuple[int, float]]:
    """Return the steps and validation losses of a run.

    The loss before the first step is included if it is known. Losses that are not finite are left out.
    """
    points = [] if before is None else [(0, before)]
    points += [(line["step"], line["validation_loss"]) for line in metrics if "validation_loss" in line]
    return [(step, loss) for step, loss in points if math.isfinite(loss)]
