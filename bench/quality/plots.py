"""Plot the losses of an experiment."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import matplotlib as mpl

from bench.quality.experiments import Rows
from bench.quality.runs import SIZES, HeldOut
from bench.quality.store import Found

mpl.use("agg")

_MARKERS = "os^DvPX"


def points(losses: Mapping[str, Sequence[float]], held_out: HeldOut, path: Path) -> None:
    """Plot the loss of every row at each seed, and the mean of each row.

    A vertical line marks the mean of the first row.
    """
    from matplotlib import pyplot  # noqa: PLC0415, slow to import

    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.22 * len(losses)), layout="constrained")
    for place, by_seed in enumerate(losses.values()):
        axes.plot(by_seed, [place] * len(by_seed), "o", color="0.6", markersize=4)
        axes.plot(mean(by_seed), place, "o", color="C0", markersize=6)
    axes.axvline(mean(next(iter(losses.values()))), color="0.8", zorder=0)
    axes.set(xlabel=f"{held_out} loss, nats per byte", yticks=range(len(losses)), yticklabels=list(losses))
    axes.locator_params(axis="x", nbins=6)  # so that labels do not touch
    axes.invert_yaxis()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def curves(found: Found, rows: Rows, held_out: HeldOut, path: Path) -> None:
    """Plot the loss over tokens, bytes of state, and bytes sent in the run."""
    from matplotlib import pyplot  # noqa: PLC0415, slow to import

    figure, (over_tokens, states, sent) = pyplot.subplots(1, 3, figsize=(17, 5), layout="constrained")
    over_tokens.set_prop_cycle(color=mpl.colormaps["tab20"].colors)  # twenty colors, so that none repeats
    for index, (name, stage) in enumerate(rows.items()):
        lines = [found[run] for run in stage.runs if run in found and found[run]["loss"] is not None]
        if not lines or stage.missing:
            continue
        size, marker = SIZES[stage.runs[0].size], _MARKERS[index % len(_MARKERS)]
        steps, losses = zip(*lines[0]["curve"], strict=True)
        means = [mean(line["curve"][place][1] for line in lines) for place in range(len(losses))]
        tokens = [step * size.batch * size.length / 1e3 for step in steps]
        (drawn,) = over_tokens.plot(tokens, means, marker=marker, markersize=4, linewidth=1, label=name)
        loss = mean(line["loss"] for line in lines)
        states.plot(lines[0]["bytes"]["state"] / 1e6, loss, marker, color=drawn.get_color())
        sent.plot(stage.runs[0].sent_bytes() * size.steps / 1e6, loss, marker, color=drawn.get_color())
    over_tokens.set(xlabel="thousand tokens", ylabel=f"{held_out} loss, nats per byte")
    states.set(xlabel="optimizer state, MB", xlim=(0, None))
    sent.set(xlabel="sent in a data-parallel run, MB", xlim=(0, None))
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
