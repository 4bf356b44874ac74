"""What a run tells: metrics.jsonl, a progress bar, loss.png and the closing table."""

import json
import os
from pathlib import Path
from typing import Any

import matplotlib as mpl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dynlora_fn import LowRank
from dynlora_fn.bases import Quantized, Sharded
from dynlora_fn.parallel import WireBytes
from models.pretrain.method import Method

mpl.use("agg")


class MetricsFile:
    """One JSON object a line, a line a step. Nothing in it depends on the clock: equal runs write equal files."""

    def __init__(self, path: Path, first_step: int):
        """Keeps the lines before `first_step` and drops later ones, which a run that was killed may have left."""
        self._path = path
        kept = read_metrics(path, before=first_step)
        temporary = path.with_suffix(".writing")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.rename(path)

    def append(self, lines: list[dict[str, Any]]) -> None:
        with self._path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())


def read_metrics(path: Path, *, before: int | None = None) -> list[dict[str, Any]]:
    """The lines of a metrics file up to step `before`; a torn last line is dropped.

    Raises:
        ValueError: if another line is no metrics; it names the file and the line.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    metrics = [_metrics(line, path, number) for number, line in enumerate(lines, start=1)]
    return [line for line in metrics if before is None or line["step"] <= before]


def _metrics(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("step"), int):
        raise ValueError(
            f"metrics must be JSON objects with a step, got {line[:60]!r} in line {number} of {str(path)!r}"
        )
    return found


class ProgressBar:
    """A live bar in a terminal, a plain line at each validation loss elsewhere."""

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


def plot(metrics: list[dict[str, Any]], unigram_loss: float, path: Path) -> None:
    """Training and validation loss above, the vectors switched at each step below."""
    from matplotlib import pyplot  # noqa: PLC0415, slow to import

    figure, (losses, switches) = pyplot.subplots(
        2, 1, sharex=True, figsize=(8, 5.5), height_ratios=(4, 1), layout="constrained"
    )
    steps = [line["step"] for line in metrics]
    losses.plot(
        steps, [line["loss"] for line in metrics], color="tab:blue", alpha=0.35, linewidth=0.8, label="training"
    )
    validated = [line for line in metrics if "validation_loss" in line]
    points = [line["validation_loss"] for line in validated]
    losses.plot([line["step"] for line in validated], points, color="tab:orange", marker="o", label="validation")
    losses.axhline(unigram_loss, color="grey", linestyle="--", label="unigram model, validation")
    losses.set(ylabel="loss (nats a token)")
    losses.legend(frameon=False)
    switched = [(line["step"], line["switched"]) for line in metrics if line["switched"]]
    if switched:
        switches.bar(*zip(*switched, strict=True), width=1.0, color="tab:green")
    switches.set(xlabel="step", ylabel="vectors\nswitched", ylim=(0, None))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def sizes(method: Method, wire: WireBytes) -> dict[str, Any]:
    """Numbers of parameters, and bytes of this process, of the run and of full-rank AdamW in float32 on the same model.

    `wire` is what several processes send in a step.
    """
    params = method.state.params()
    low_rank = [param for param in params.values() if isinstance(param, LowRank)]
    whole = sum(param.shape.numel() for param in params.values())
    factors = sum(param.shape[:-2].numel() * _rank(param) * sum(param.shape[-2:]) for param in low_rank)
    full_rank = [leaf for leaf in method.state.trainable.values() if isinstance(leaf, Tensor)]
    trainable = factors + sum(leaf.numel() for leaf in full_rank)
    return {
        "parameters": whole,
        "trainable": trainable,
        "trainable_share": trainable / whole,
        "bytes": {
            "base": count_bytes([_codes(_held(param.base)) for param in low_rank]),
            "residual": count_bytes([_residual(_held(param.base)) for param in low_rank]),
            "factors": count_bytes([param.factors for param in low_rank]),
            "full_rank": count_bytes([param for param in params.values() if isinstance(param, Tensor)]),
            "gradients": count_bytes(method.state.trainable),
            "optimizer": count_bytes(method.state.opt_state),
            "candidates": count_bytes(method.pool),
        },
        "full_rank_adamw_bytes": {"full_rank": 4 * whole, "gradients": 4 * whole, "optimizer": 8 * whole},
        "wire_bytes_per_step": wire._asdict(),
        "reduced_bytes_per_step": wire.reduced + wire.scattered,
        "full_rank_reduced_bytes_per_step": 4 * whole,
    }


def _rank(param: LowRank) -> int:
    return param.factors.b.shape[-1]


def _held(base: Any) -> Any:
    return base.base if isinstance(base, Sharded) else base


def _codes(base: Any) -> Any:
    return base.codes if isinstance(base, Quantized) else base


def _residual(base: Any) -> Any:
    return base.residual if isinstance(base, Quantized) else ()


def count_bytes(tree: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def closing_table(summary: dict[str, Any]) -> Table:
    table = Table("", "this run", "full-rank AdamW", title=f"{summary['method']}, {summary['steps']} steps")
    table.columns[1].justify = table.columns[2].justify = "right"
    whole, full = summary["parameters"], summary["full_rank_adamw_bytes"]
    share = f"{summary['trainable']:,} ({summary['trainable_share']:.1%})"
    table.add_row("trainable parameters", share, f"{whole:,} (100.0%)")
    for name, label in (
        ("base", "frozen bases"),
        ("residual", "residuals of the bases"),
        ("factors", "factors"),
        ("full_rank", "full-rank weights"),
        ("gradients", "gradients"),
        ("optimizer", "optimizer state"),
        ("candidates", "candidates (host memory)"),
    ):
        table.add_row(f"{label}, bytes", f"{summary['bytes'][name]:,}", f"{full.get(name, 0):,}")
    table.add_row(
        "all of these, bytes", f"{sum(summary['bytes'].values()):,}", f"{sum(full.values()):,}", end_section=True
    )
    reduced = f"{summary['reduced_bytes_per_step']:,}", f"{summary['full_rank_reduced_bytes_per_step']:,}"
    for name, label in (("factors", "of factors"), ("full_rank", "of full-rank weights")):
        whole = summary["full_rank_reduced_bytes_per_step"] if name == "full_rank" else 0
        table.add_row(f"bytes {label} reduced a step", f"{summary['wire_bytes_per_step'][name]:,}", f"{whole:,}")
    table.add_row("bytes reduced a step, data parallel", *reduced)
    share = summary["reduced_bytes_per_step"] / summary["full_rank_reduced_bytes_per_step"]
    table.add_row("  share of full rank's", f"{share:.1%}")
    if summary["wire_bytes_per_step"]["bases"]:
        table.add_row("bytes of bases gathered a step", f"{summary['wire_bytes_per_step']['bases']:,}", "0")
    if summary["wire_bytes_per_step"]["gathered"]:
        table.add_row("bytes of factors gathered a step", f"{summary['wire_bytes_per_step']['gathered']:,}", "0")
    table.add_row("processes", f"{summary['processes']}", end_section=True)
    table.add_row("vectors switched", f"{summary['switched']:,}")
    if summary["drift"] is not None:
        table.add_row("drift of the bases, relative", f"{summary['drift']:.2e}")
    table.add_row("tokens/s", f"{summary['tokens_per_second']:,.0f}")
    table.add_row("seconds", f"{summary['seconds']:.0f}")
    table.add_row("validation loss, nats a token", f"{summary['validation_loss']:.4f}")
    table.add_row("  of a unigram model", f"{summary['unigram_loss']:.4f}")
    table.add_row("validation perplexity", f"{summary['perplexity']:.3f}")
    return table
