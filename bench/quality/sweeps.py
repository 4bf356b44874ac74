"""The rule by which every method's learning rate is found, and how many seeds it is then run with."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from bench.quality.runs import Run
from bench.quality.store import Found

SEEDS = (0, 1, 2)
# Where the sweep starts: the papers' rates.
CENTERS = {"full": 2e-3, "lora": 1e-2, "relora": 1e-2, "galore": 1e-2, "apollo": 1e-2, "switchlora": 2e-2}
MUON = 2e-3  # of the dense weight, whatever is trained: AdamW's for that


class Stage(NamedTuple):
    """What is still to be run, or the answer."""

    missing: list[Run]
    runs: list[Run]  # of the best rate, one for each seed


def loss_of(found: Found, run: Run) -> float:
    loss = found[run]["loss"]
    return math.inf if loss is None else loss


def swept(found: Found, run: Run, *, start: Run | None = None, seeds: Sequence[int] = SEEDS) -> Stage:
    """The best rates at the first seed, run at all seeds: that of the matrices or factors, and that of embedding, head
    and norms.

    A search by neighbors from the papers' rate for both, or from those of `start`: one twice or half as high, the other
    four times or a quarter as high, until all four neighbors are worse.
    """
    lr, dense_lr = (start.lr, start.dense_lr) if start else (papers_rate(run), 1.0)
    best = replace(run, lr=lr, dense_lr=dense_lr, seed=seeds[0])
    while True:
        near = [best, *neighbors(best)]
        if missing := [one for one in near if one not in found]:
            return Stage(missing, [])
        better = min(near, key=lambda one: loss_of(found, one))  # of equals the first
        if better == best:
            return at_seeds(found, best, seeds)
        best = better


def papers_rate(run: Run) -> float:
    return CENTERS[run.method] if run.optimizer == "adamw" else MUON


def neighbors(run: Run) -> list[Run]:
    """One rate is another and the other stays: `dense_lr` is relative to `lr`."""
    moves = [(2.0, 0.5), (0.5, 2.0), (1.0, 4.0), (1.0, 0.25)]
    return [replace(run, lr=run.lr * lr, dense_lr=run.dense_lr * dense) for lr, dense in moves]


def at_seeds(found: Found, run: Run, seeds: Sequence[int] = SEEDS) -> Stage:
    runs = [replace(run, seed=seed) for seed in seeds]
    return Stage([one for one in runs if one not in found], runs)


def missing_of(stages: Iterable[Stage]) -> list[Run]:
    return list(dict.fromkeys(run for stage in stages for run in stage.missing))
