"""The results of a run: loss.png, its sizes and the closing table."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
from rich.table import Table
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dynlora_fn import LowRank
from dynlora_fn.bases._base import as_base
from dynlora_fn.parallel import WireBytes
from models.pretrain.method import Method

mpl.use("agg")


def plot(metrics: list[dict[str, Any]], unigram_loss: float, path: Path) -> None:
    """Plot training and validation loss, and the vectors switched at each step."""
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
    losses.set(ylabel="loss (nats per token)")
    losses.legend(frameon=False)
    switched = [(line["step"], line["switched"]) for line in metrics if line["switched"]]
    if switched:
        switches.bar(*zip(*switched, strict=True), width=1.0, color="tab:green")
    switches.set(xlabel="step", ylabel="vectors\nswitched", ylim=(0, None))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def sizes(method: Method, wire: WireBytes) -> dict[str, Any]:
    """Return counts of parameters, and bytes of this process by kind.

    Bytes of full-rank AdamW in float32 are included for comparison.

    `wire` is what several processes send in a step.
    """
    params = method.state.params()
    low_rank = [param for param in params.values() if isinstance(param, LowRank)]
    bases = [as_base(as_base(param.base).folded) for param in low_rank]
    total = sum(param.shape.numel() for param in params.values())
    factors = sum(param.shape[:-2].numel() * _rank(param) * sum(param.shape[-2:]) for param in low_rank)
    full_rank = [leaf for leaf in method.state.trainable.values() if isinstance(leaf, Tensor)]
    trainable = factors + sum(leaf.numel() for leaf in full_rank)
    return {
        "parameters": total,
        "trainable": trainable,
        "trainable_share": trainable / total,
        "bytes": {
            "base": count_bytes([base.flatten().tensors for base in bases]),
            "residual": count_bytes([base.residual for base in bases]),
            "factors": count_bytes([param.factors for param in low_rank]),
            "full_rank": count_bytes([param for param in params.values() if not isinstance(param, LowRank)]),
            "gradients": count_bytes(method.state.trainable),
            "optimizer": count_bytes(method.state.opt_state),
            "candidates": count_bytes(method.pool),
        },
        "full_rank_adamw_bytes": {"full_rank": 4 * total, "gradients": 4 * total, "optimizer": 8 * total},
        "wire_bytes_per_step": wire._asdict(),
        "reduced_bytes_per_step": wire.reduced + wire.scattered,
        "full_rank_reduced_bytes_per_step": 4 * total,
    }


def _rank(param: LowRank) -> int:
    return param.factors.b.shape[-1]


def count_bytes(tree: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def closing_table(summary: dict[str, Any]) -> Table:
    """Return the summary as a table that compares the run with full-rank AdamW."""
    table = Table("", "this run", "full-rank AdamW", title=f"{summary['method']}, {summary['steps']} steps")
    table.columns[1].justify = table.columns[2].justify = "right"
    for section in (_memory_rows, _communication_rows, _result_rows):
        for row in section(summary):
            table.add_row(*row)
        table.add_section()
    return table


Rows = Iterator[tuple[str, ...]]


def _memory_rows(summary: dict[str, Any]) -> Rows:
    total, full = summary["parameters"], summary["full_rank_adamw_bytes"]
    trainable = f"{summary['trainable']:,} ({summary['trainable_share']:.1%})"
    yield "trainable parameters", trainable, f"{total:,} (100.0%)"
    for name, label in (
        ("base", "frozen bases"),
        ("residual", "residuals of the bases"),
        ("factors", "factors"),
        ("full_rank", "full-rank weights"),
        ("gradients", "gradients"),
        ("optimizer", "optimizer state"),
        ("candidates", "candidates (host memory)"),
    ):
        yield f"{label}, bytes", f"{summary['bytes'][name]:,}", f"{full.get(name, 0):,}"
    yield "total of these, bytes", f"{sum(summary['bytes'].values()):,}", f"{sum(full.values()):,}"


def _communication_rows(summary: dict[str, Any]) -> Rows:
    wire = summary["wire_bytes_per_step"]
    reduced, full = summary["reduced_bytes_per_step"], summary["full_rank_reduced_bytes_per_step"]
    yield "bytes of factors reduced per step", f"{wire['factors']:,}", "0"
    yield "bytes of full-rank weights reduced per step", f"{wire['full_rank']:,}", f"{full:,}"
    yield "bytes reduced per step, data parallel", f"{reduced:,}", f"{full:,}"
    yield "  as a fraction of full-rank training", f"{reduced / full:.1%}"
    if wire["bases"]:
        yield "bytes of bases all-gathered per step", f"{wire['bases']:,}", "0"
    if wire["gathered"]:
        yield "bytes of factors all-gathered per step", f"{wire['gathered']:,}", "0"
    yield "processes", f"{summary['processes']}"


def _result_rows(summary: dict[str, Any]) -> Rows:
    yield "vectors switched", f"{summary['switched']:,}"
    if summary["drift"] is not None:
        yield "drift of the bases, relative", f"{summary['drift']:.2e}"
    yield "tokens per second", f"{summary['tokens_per_second']:,.0f}"
    yield "seconds", f"{summary['seconds']:.0f}"
    yield "validation loss, nats per token", f"{summary['validation_loss']:.4f}"
    yield "  of a unigram model", f"{summary['unigram_loss']:.4f}"
    yield "validation perplexity", f"{summary['perplexity']:.3f}"
