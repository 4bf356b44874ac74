"""Draw the two pictures of the README, of one weight and of one step.

``python -m bench.figures`` writes them to `bench/results/figures`. It needs the extra `train`. The shapes and bytes in
the pictures come from a real weight.
"""

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.pyplot import close, subplots
from torch import nn
from torch.utils._pytree import tree_leaves

import dynlora_fn as dl

FOLDER = Path(__file__).parent / "results" / "figures"
FROZEN, TRAINED, MOVED, STATE = "#cfd8dc", "#90caf9", "#ef6c00", "#c5e1a5"
OUT, IN, RANK, SLOT = 256, 128, 16, 5


def params_of_figure() -> dict[str, dl.LowRank]:
    """Return the weight that both pictures show."""
    return dl.init(nn.Linear(IN, OUT, bias=False), rank=RANK, seed=0, targets=["weight"])


def box(axes: Axes, x: float, y: float, width: float, height: float, color: str, text: str = "") -> None:
    """Draw a rectangle with its lower left corner at (x, y) and a text in its middle."""
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="#37474f", linewidth=0.8))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)


def rounded(axes: Axes, x: float, y: float, width: float, height: float, color: str, text: str) -> None:
    """Draw a rounded box with a text in its middle."""
    style = f"round,pad=0,rounding_size={height / 8}"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color, edgecolor="#37474f"))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0) -> None:
    """Draw an arrow between two points."""
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=MOVED, connectionstyle=style, lw=1.4)
    )


def draw_weight(axes: Axes) -> None:
    """Draw the base, the factors, and what a switch of one slot moves.

    All shapes are in proportion. The switch is of side a.
    """
    param = params_of_figure()["weight"]
    (out, inner), rank = param.base.shape, param.factors.a.shape[0]
    k = SLOT
    box(axes, 0, 0, inner, out, FROZEN, f"base\n({out}, {inner})\n\nfrozen, may be\nint8 or nf4")
    axes.text(inner + 22, out / 2, r"$+\;\frac{\alpha}{r}$", ha="center", va="center", fontsize=15)
    left = inner + 45
    box(axes, left, 0, rank, out, TRAINED)
    axes.text(left + rank / 2, -16, f"b\n({out}, {rank})", ha="center", va="top", fontsize=9)
    axes.text(left + rank + 12, out / 2, "@", ha="center", va="center", fontsize=12)
    top, row = out / 2 - rank / 2, left + rank + 25
    box(axes, row, top, inner, rank, TRAINED)
    axes.text(row + inner / 2, top - 10, f"a ({rank}, {inner})", ha="center", va="top", fontsize=9)
    # Slot k: the column b[:, k] and the row a[k].
    axes.add_patch(Rectangle((left + k, 0), 2, out, color="#1565c0"))
    axes.text(left + k, out + 5, f"b[:, {k}], the counterpart:\nits optimizer state is reset", ha="center", fontsize=8)
    axes.add_patch(Rectangle((row, top + rank - k - 2), inner, 2, color=MOVED))
    # The vector that enters, and where the difference goes.
    entering = top + 72
    axes.add_patch(Rectangle((row, entering), inner, 2, color=MOVED))
    axes.text(row, entering + 10, "the vector that enters, from (seed, side, index)", fontsize=8)
    arrow(axes, (row + inner / 2, entering - 2), (row + inner / 2, top + rank + 1))
    axes.text(row + inner / 2 + 5, top + 42, f"a[{k}] is replaced", fontsize=8, va="center")
    arrow(axes, (row - 2, top - 50), (inner * 0.8, 40), bend=-0.15)
    axes.text(row, top - 50, f"b[:, {k}] (old a[{k}] - new a[{k}])\nis folded into the base", fontsize=8, va="center")
    axes.text(row, -16, "seed ()  int64", fontsize=9, va="top")
    axes.set_title("A switch replaces one vector, and the weight does not change", fontsize=11, loc="left")
    axes.text(-8, out / 2, "weight  =", ha="right", va="center", fontsize=11)
    axes.set_xlim(-70, row + inner + 50)
    axes.set_ylim(-50, out + 34)


def draw_step(axes: Axes) -> None:
    """Draw what one compiled step reads, sends and writes, in bytes."""
    params = params_of_figure()
    trainable, frozen = dl.partition(params)
    opt_state = dl.optim.adamw().init(trainable)
    sent = dl.parallel.wire_bytes(trainable, frozen)
    kilobytes = {
        name: sum(leaf.nbytes for leaf in tree_leaves(tree)) / 1024
        for name, tree in (("trainable", trainable), ("frozen", frozen), ("opt_state", opt_state))
    }
    heights = {"trainable": 4.4, "frozen": 3.0, "opt_state": 1.6}
    colors = {"trainable": TRAINED, "frozen": FROZEN, "opt_state": STATE}
    texts = {"trainable": "trainable: b, a", "frozen": "frozen: base, seed", "opt_state": "opt_state: moments"}
    for x in (0.0, 9.6):
        for name, y in heights.items():
            rounded(axes, x, y, 2.5, 1.1, colors[name], f"{texts[name]}\n{kilobytes[name]:.1f} KiB")
    rounded(axes, 3.2, 0.9, 5.7, 5.2, "#fafafa", "")
    axes.text(6.05, 5.75, "compile_step: one graph", ha="center", fontsize=10)
    stages = (
        ("value_and_grad: forward and backward pass", "#ffffff"),
        (f"all_reduce_mean: {sum(sent) / 1024:.1f} KiB of gradients are sent", "#ffe0b2"),
        ("switch: vectors from the seed, nothing is sent", "#ffffff"),
        ("project_optimizer_state: counterparts are reset", "#ffffff"),
        ("update, apply_updates", "#ffffff"),
    )
    for index, (text, color) in enumerate(stages):
        rounded(axes, 3.5, 4.8 - 0.88 * index, 5.1, 0.6, color, text)
        if index:
            arrow(axes, (6.05, 5.68 - 0.88 * index), (6.05, 5.4 - 0.88 * index))
    for y in heights.values():
        arrow(axes, (2.5, y + 0.55), (3.2, y + 0.55))
        arrow(axes, (8.9, y + 0.55), (9.6, y + 0.55))
    axes.text(1.25, 5.75, "state", ha="center", fontsize=10)
    axes.text(10.85, 5.75, "new state", ha="center", fontsize=10)
    arrow(axes, (10.85, 1.5), (1.25, 1.5), bend=-0.16)
    axes.text(6.05, 0.12, "donated: the new state is in the memory of the old one", ha="center", fontsize=9)
    dense = 2 * OUT * IN * 4 / 1024
    note = f"Full-rank AdamW: {dense:.0f} KiB of moments, {dense / 2:.0f} KiB of gradients are sent."
    title = f"One step of a weight ({OUT}, {IN}) at rank {RANK}, in float32"
    axes.set_title(title, fontsize=11, loc="left")
    axes.text(6.05, -0.35, note, ha="center", fontsize=9)
    axes.set_xlim(-0.2, 12.3)
    axes.set_ylim(-0.6, 6.3)


def save(draw: Callable[[Axes], None], path: Path, size: tuple[float, float]) -> None:
    """Write a picture.

    The same versions of the libraries write the same bytes.
    """
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "figures", "font.family": "sans-serif"})
    figure, axes = subplots(figsize=size)
    axes.set_axis_off()
    draw(axes)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)
    close(figure)


def main(folder: Path = FOLDER, suffix: str = "svg") -> None:
    """Write both pictures into a folder."""
    mpl.use("agg")
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    save(draw_weight, folder / f"weight.{suffix}", (8, 5))
    save(draw_step, folder / f"step.{suffix}", (10.5, 4.6))


if __name__ == "__main__":
    main()
