"""What an experiment has found so far: a Markdown table, and plots."""

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import matplotlib as mpl

from bench.quality.experiments import Rows
from bench.quality.runs import SIZES, HeldOut
from bench.quality.store import Found

mpl.use("agg")

_MARKERS = "os^DvPX"

COLUMNS = (
    "",
    "rate",
    "of embedding, head, norms",
    "{held_out} loss",
    "std",
    "over the first",
    "p",
    "state, kB",
    "sent a step, kB",
    "effective rank",
    "norm of the change",
)


class Row(NamedTuple):
    """What the seeds of one row have in common."""

    name: str
    lr: float
    dense_lr: float  # over `lr`
    held_out: HeldOut
    losses: list[float]
    over_first: float  # mean difference to the first row of the table, seed by seed
    p: float  # two-sided, of a paired t-test of it
    state: int  # bytes, that of the optimizer and projections
    sent: int  # bytes a step
    measures: Mapping[str, Any]


def rows_of(found: Found, rows: Rows) -> list[Row]:
    """Rows that have been run with all seeds; one that diverged at any of them has an infinite loss."""
    finished = {name: stage.runs for name, stage in rows.items() if stage.runs and not stage.missing}
    first: list[float] = []
    made = []
    for name, runs in finished.items():
        lines = [found[run] for run in runs]
        losses = [math.inf if line["loss"] is None else line["loss"] for line in lines]
        first = first or losses
        differences = [loss - other for loss, other in zip(losses, first, strict=True)]
        last = next((line for line in lines if "bytes" in line), {"bytes": {}, "measures": {}})
        made.append(
            Row(
                name,
                runs[0].lr,
                runs[0].dense_lr,
                runs[0].held_out,
                losses,
                mean(differences),
                paired_p(differences),
                last["bytes"].get("state", 0),
                runs[0].sent_bytes(),
                last["measures"],
            )
        )
    return made


def paired_p(differences: list[float]) -> float:
    """That the mean of such differences is as far from zero by chance (Student's t, two-sided)."""
    from scipy.stats import ttest_1samp  # noqa: PLC0415, an optional extra

    if not all(map(math.isfinite, differences)) or not any(differences):
        return math.nan
    return float(ttest_1samp(differences, 0).pvalue)


def table(rows: list[Row], size: str) -> str:
    header = " | ".join(COLUMNS).format(held_out=rows[0].held_out)
    lines = [f"| {header} |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        spread = stdev(row.losses) if len(row.losses) > 1 and all(map(math.isfinite, row.losses)) else math.nan
        cells = [
            row.name,
            f"{row.lr:.3g}",
            f"{row.lr * row.dense_lr:.3g}",
            f"{mean(row.losses):.4f}",
            f"{spread:.4f}",
            f"{row.over_first:+.4f}",
            f"{row.p:.3f}",
            f"{row.state / 1e3:.0f}",
            f"{row.sent / 1e3:.0f}",
            f"{row.measures.get('effective_rank_share', math.nan):.2f}",
            f"{row.measures.get('update_norm', math.nan):.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    parameters, steps = SIZES[size].parameters(), SIZES[size].steps
    tokens = steps * SIZES[size].batch * SIZES[size].length
    title = f"## {size}: {parameters:,} parameters without embedding and head, {steps} steps, {tokens:,} tokens"
    return "\n".join([title, "", *lines, ""])


def points(rows: list[Row], path: Path) -> None:
    """The loss of every row at each seed, their mean, and that of the first row."""
    from matplotlib import pyplot  # noqa: PLC0415, slow to import

    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.22 * len(rows)), layout="constrained")
    for place, row in enumerate(rows):
        axes.plot(row.losses, [place] * len(row.losses), "o", color="0.6", markersize=4)
        axes.plot(mean(row.losses), place, "o", color="C0", markersize=6)
    axes.axvline(mean(rows[0].losses), color="0.8", zorder=0)
    axes.set(
        xlabel=f"{rows[0].held_out} loss, nats a byte", yticks=range(len(rows)), yticklabels=[row.name for row in rows]
    )
    axes.invert_yaxis()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def curves(found: Found, rows: Rows, held_out: HeldOut, path: Path) -> None:
    """Loss against tokens, bytes of state, and bytes sent over the run."""
    from matplotlib import pyplot  # noqa: PLC0415, slow to import

    figure, (over_tokens, states, sent) = pyplot.subplots(1, 3, figsize=(17, 5), layout="constrained")
    over_tokens.set_prop_cycle(color=mpl.colormaps["tab20"].colors)  # no color twice
    for number, (name, stage) in enumerate(rows.items()):
        lines = [found[run] for run in stage.runs if run in found and found[run]["loss"] is not None]
        if not lines or stage.missing:
            continue
        size, marker = SIZES[stage.runs[0].size], _MARKERS[number % len(_MARKERS)]
        steps, losses = zip(*lines[0]["curve"], strict=True)
        means = [mean(line["curve"][place][1] for line in lines) for place in range(len(losses))]
        tokens = [step * size.batch * size.length / 1e3 for step in steps]
        (drawn,) = over_tokens.plot(tokens, means, marker=marker, markersize=4, linewidth=1, label=name)
        loss = mean(line["loss"] for line in lines)
        states.plot(lines[0]["bytes"]["state"] / 1e6, loss, marker, color=drawn.get_color())
        sent.plot(stage.runs[0].sent_bytes() * size.steps / 1e6, loss, marker, color=drawn.get_color())
    over_tokens.set(xlabel="thousand tokens", ylabel=f"{held_out} loss, nats a byte")
    states.set(xlabel="state of the optimizer, MB", xlim=(0, None))
    sent.set(xlabel="sent over the run where data are parallel, MB", xlim=(0, None))
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def report(folder: Path, experiment: str, found: Found, by_size: Mapping[str, Rows]) -> None:
    """EXPERIMENT.md, and EXPERIMENT_SIZE.png for each size."""
    parts = [f"# `python -m bench.quality {experiment}`", ""]
    for size, rows in by_size.items():
        finished = rows_of(found, rows)
        if finished:
            parts += [table(finished, size), f"![losses]({experiment}_{size}.png)", ""]
            path = folder / f"{experiment}_{size}.png"
            if "baseline" in rows:
                points(finished, path)
            else:
                curves(found, rows, finished[0].held_out, path)
        open_rows = [name for name, stage in rows.items() if stage.missing or not stage.runs]
        if open_rows:
            parts += [f"Still to be run at size {size}: {'; '.join(open_rows)}.", ""]
    (folder / f"{experiment}.md").write_text("\n".join(parts))
