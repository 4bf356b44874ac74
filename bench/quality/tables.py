"""Write the results of an experiment so far, as Markdown tables and plots."""

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from bench.quality import plots
from bench.quality.experiments import Rows
from bench.quality.runs import SIZES, HeldOut
from bench.quality.store import Found

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
    """The results of one row of the table."""

    name: str
    lr: float
    dense_lr: float  # over `lr`
    held_out: HeldOut
    losses: list[float]
    over_first: float  # mean difference to the first row of the table, seed by seed
    p: float  # p-value of a two-sided paired t-test of `over_first`
    state: int  # bytes of optimizer state and projections
    sent: int  # bytes per step
    measures: Mapping[str, Any]


def rows_of(found: Found, rows: Rows) -> list[Row]:
    """Return the rows that have run with all seeds.

    The loss of a run that has diverged is infinite.
    """
    finished = {name: stage.runs for name, stage in rows.items() if stage.runs and not stage.missing}
    first: list[float] = []
    result = []
    for name, runs in finished.items():
        lines = [found[run] for run in runs]
        losses = [math.inf if line["loss"] is None else line["loss"] for line in lines]
        first = first or losses
        differences = [loss - other for loss, other in zip(losses, first, strict=True)]
        last = next((line for line in lines if "bytes" in line), {"bytes": {}, "measures": {}})
        result.append(
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
    return result


def paired_p(differences: list[float]) -> float:
    """Return the p-value of a two-sided t-test for a mean difference of zero."""
    from scipy.stats import ttest_1samp  # noqa: PLC0415, an optional extra

    if not all(map(math.isfinite, differences)) or not any(differences):
        return math.nan
    return float(ttest_1samp(differences, 0).pvalue)


def markdown_table(rows: list[Row], size: str) -> str:
    """Return the table of one size in Markdown."""
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


def write_report(folder: Path, experiment: str, found: Found, by_size: Mapping[str, Rows]) -> None:
    """Write EXPERIMENT.md, and EXPERIMENT_SIZE.png for each size."""
    parts = [f"# `python -m bench.quality {experiment}`", ""]
    for size, rows in by_size.items():
        finished = rows_of(found, rows)
        if finished:
            parts += [markdown_table(finished, size), f"![losses]({experiment}_{size}.png)", ""]
            path = folder / f"{experiment}_{size}.png"
            if "baseline" in rows:
                plots.points({row.name: row.losses for row in finished}, finished[0].held_out, path)
            else:
                plots.curves(found, rows, finished[0].held_out, path)
        open_rows = [name for name, stage in rows.items() if stage.missing or not stage.runs]
        if open_rows:
            parts += [f"Still to be run at size {size}:", "", *(f"- {row}" for row in open_rows), ""]
    (folder / f"{experiment}.md").write_text("\n".join(parts))
