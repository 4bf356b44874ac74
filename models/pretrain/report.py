"""Count the parameters and bytes of a run, and build its closing table."""

from collections.abc import Iterator
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dynlora_fn import LowRank
from dynlora_fn.bases._base import as_base
from dynlora_fn.parallel import WireBytes
from dynlora_fn.switching import OneSidedFactors
from models.pretrain.method import Method
from models.pretrain.progress import duration


def sizes(method: Method, wire: WireBytes) -> dict[str, Any]:
    """Return counts of parameters and bytes, as entries of the summary.

    Bytes are the bytes of this process. For comparison, they include the bytes of full-rank training in float32 with
    AdamW.

    Args:
        method: The method with its initial state.
        wire: The bytes that each process sends in a step.
    """
    params = method.state.params()
    low_rank = [param for param in params.values() if isinstance(param, LowRank)]
    bases = [as_base(as_base(param.base).folded) for param in low_rank]
    total = sum(param.shape.numel() for param in params.values())
    factors = sum(param.shape[:-2].numel() * _rank(param) * sum(_trained_sizes(param)) for param in low_rank)
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


def _trained_sizes(param: LowRank) -> torch.Size:
    """Return `out` and `in`, or only `out` if `a` is not trained."""
    return param.shape[-2:-1] if isinstance(param.factors, OneSidedFactors) else param.shape[-2:]


def _rank(param: LowRank) -> int:
    return param.factors.b.shape[-1]


def count_bytes(tree: Any) -> int:
    """Return the number of bytes of all tensors in a tree."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def closing_table(summary: dict[str, Any]) -> Table:
    """Return the summary as a table that compares the run with full-rank AdamW.

    The column of full-rank AdamW is computed from the sizes of the model, and not measured.
    """
    title = f"{summary['model']}, {summary['method']}, {summary['steps']} steps"
    table = Table("", "this run", "full-rank AdamW,\ncomputed", title=title)
    table.columns[1].justify = table.columns[2].justify = "right"
    sections = [_result_rows, _memory_rows]
    if summary["processes"] > 1:
        sections.append(_communication_rows)
    for section in sections:
        for row in section(summary):
            table.add_row(*row)
        table.add_section()
    return table


Rows = Iterator[tuple[str, ...]]


def _result_rows(summary: dict[str, Any]) -> Rows:
    yield "validation loss, nats per token", f"{summary['validation_loss']:.4f}"
    yield "  of a unigram model", f"{summary['unigram_loss']:.4f}"
    if (bits := summary.get("bits_per_byte")) is not None:
        yield "  in bits per byte", f"{bits:.4f}"
    yield "  perplexity", f"{summary['perplexity']:.3f}"
    if summary["switched"]:
        yield "vectors switched", f"{summary['switched']:,}"
    if summary["drift"] is not None:
        yield "drift of the bases, relative", f"{summary['drift']:.2e}"
    if summary["tokens_per_second"] is not None:
        yield "tokens per second", f"{summary['tokens_per_second']:,.0f}"
    yield "time", duration(summary["seconds"])


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
        if summary["bytes"][name]:
            yield label, size(summary["bytes"][name]), size(full[name]) if name in full else ""
    yield "total of these", size(sum(summary["bytes"].values())), size(sum(full.values()))


def _communication_rows(summary: dict[str, Any]) -> Rows:
    wire = summary["wire_bytes_per_step"]
    reduced, full = summary["reduced_bytes_per_step"], summary["full_rank_reduced_bytes_per_step"]
    yield "processes", f"{summary['processes']}"
    for name, label in (("factors", "factors"), ("full_rank", "full-rank weights")):
        if wire[name]:
            yield f"{label} reduced per step", size(wire[name]), size(full) if name == "full_rank" else ""
    yield "reduced per step", size(reduced), size(full)
    yield "  as a fraction of full-rank training", f"{reduced / full:.1%}"
    for name, label in (("bases", "bases"), ("gathered", "factors")):
        if wire[name]:
            yield f"{label} all-gathered per step", size(wire[name])


def size(count: float) -> str:
    """Return a number of bytes with its unit, in powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
