"""How long does one switch take, and how many bytes per second does it move?

Rank, width and the number of vectors vary. The switch is compiled, and its state is donated. It generates vectors from
the basis, folds the difference into the base in place, and projects the optimizer state. A copy of the base shows how
long it takes at least to read and write the base.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import tyro

import dynlora_fn as dl
from bench.support.harness import Options, finish, start, table
from bench.support.timing import Timing, interleave


@dataclass(frozen=True)
class Switch(Options):
    widths: tuple[int, ...] = (512, 1024)
    fractions: tuple[int, ...] = (4, 8)
    """The ranks, each as width over rank."""
    counts: tuple[int, ...] = (1, 4, 16)
    """Numbers of vectors that are switched on each side of each weight, each measured separately."""
    layers: int = 8
    repeats: int = 20


def contender(config: Switch, width: int, fraction: int, count: int) -> Any:
    """Return a compiled switch of `count` vectors on each side."""
    weights = {f"layers.{n}.weight": torch.randn(width, width, device=config.device) for n in range(config.layers)}
    params = dl.init(weights, rank=width // fraction, seed=0, targets=["*"])
    trainable, frozen = dl.partition(params)
    state = trainable, frozen, dl.optim.adamw().init(trainable)
    plan = dl.schedules.every(1, count)(1, params)

    def step(state: Any, plan: Any) -> tuple[Any, None]:
        trainable, frozen, opt_state = state
        params, _ = dl.switch(dl.combine(trainable, frozen), plan)
        return (*dl.partition(params), dl.project_optimizer_state(opt_state, plan)), None

    compiled = dl.compile_step(step, **({"backend": "eager"} if config.quick else {}))
    return partial(compiled, state, plan)


def main(config: Switch) -> None:
    if config.quick:
        small = {"widths": (64,), "fractions": (4,), "counts": (1, 4), "layers": 2, "repeats": 5}
        config = Switch(**{**vars(config), **small})
    console = start(config)
    rows, raw = [], {}
    for width in config.widths:
        base = torch.randn(config.layers, width, width, device=config.device)
        out = torch.empty_like(base)
        cases = [(fraction, count) for fraction in config.fractions for count in config.counts]
        contenders = {f"d/{fraction} x {count}": contender(config, width, fraction, count) for fraction, count in cases}
        timings = interleave(
            {"copy": partial(out.copy_, base), **contenders}, repeats=config.repeats, device=config.device
        )
        moved_bytes = 2 * base.numel() * base.element_size()
        rows += [row(width, name, timing, moved_bytes, timings["copy"]) for name, timing in timings.items()]
        raw |= {f"{width} {name}": timing.all for name, timing in timings.items()}
    columns = ["width", "rank x vectors", "lower ms", "median ms", "upper ms", "GB/s of the base", "over copy"]
    console.print(table(f"one switch of {config.layers} weights, float32", columns, rows))
    finish(config, {"switch_over_copy": {f"{cells[0]} {cells[1]}": cells[-1] for cells in rows}}, raw)


def row(width: int, name: str, timing: Timing, moved_bytes: int, copy: Timing) -> list[Any]:
    """Return the cells of one contender."""
    milliseconds = [1e3 * value for value in timing[:3]]
    return [width, name, *milliseconds, moved_bytes / timing.median / 1e9, timing.median / copy.median]


if __name__ == "__main__":
    main(tyro.cli(Switch))
