"""Search the learning rates of every method, then run it with all seeds.

The search is the same for every method.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from bench.quality.runs import Run
from bench.quality.store import Found

SEEDS = (0, 1, 2)
# The papers' rates, from which a sweep starts.
CENTERS = {
    "full": 2e-3,
    "torch_muon": 1e-2,  # its update is a fifth of the update of `dl.optim.muon`
    "lora": 1e-2,
    "relora": 1e-2,
    "spectron": 2e-2,
    "galore": 1e-2,
    "apollo": 1e-2,
    "switchlora": 2e-2,
}
MUON = 2e-3  # rate from which sweeps with Muon start, which is the rate of full rank with AdamW


class Stage(NamedTuple):
    """The state of a sweep: the runs that are missing, or the result."""

    missing: list[Run]
    runs: list[Run]  # the runs with the best rates, one for each seed


def loss_of(found: Found, run: Run) -> float:
    """Return the loss of a run, or infinity if it has diverged."""
    loss = found[run]["loss"]
    return math.inf if loss is None else loss


def swept(
    found: Found,
    run: Run,
    *,
    start: Run | None = None,
    seeds: Sequence[int] = SEEDS,
    near: Callable[[Run], list[Run]] | None = None,
) -> Stage:
    """Search the best rates with the first seed, then use them with all seeds.

    There are two rates: the rate of matrices or factors, and the rate of embedding, head and norms. The search starts
    from the papers' rate for both, or from the rates of `start`. It moves to the best of four neighbors until all
    neighbors are worse. `near` returns the neighbors. Default None means `neighbors`.
    """
    lr, dense_lr = (start.lr, start.dense_lr) if start else (papers_rate(run), 1.0)
    best = replace(run, lr=lr, dense_lr=dense_lr, seed=seeds[0])
    while True:
        candidates = [best, *(near or neighbors)(best)]
        if missing := [run for run in candidates if run not in found]:
            return Stage(missing, [])
        better = min(candidates, key=lambda run: loss_of(found, run))  # the first run among equal losses
        if better == best:
            return at_seeds(found, best, seeds)
        best = better


def papers_rate(run: Run) -> float:
    """Return the rate from which the first sweep of a method starts."""
    return CENTERS[run.method] if run.optimizer == "adamw" else MUON


def neighbors(run: Run) -> list[Run]:
    """Return the runs in which one rate differs: `lr` by 2, or `dense_lr` by 4.

    `dense_lr` is relative to `lr`. If `lr` changes, the rate of embedding, head and norms stays the same.
    """
    moves = [(2.0, 0.5), (0.5, 2.0), (1.0, 4.0), (1.0, 0.25)]
    return [replace(run, lr=run.lr * lr, dense_lr=run.dense_lr * dense) for lr, dense in moves]


def dense_neighbors(run: Run) -> list[Run]:
    """Return the neighbors with another rate of embedding, head and norms."""
    return [near for near in neighbors(run) if near.lr == run.lr]


def at_seeds(found: Found, run: Run, seeds: Sequence[int] = SEEDS) -> Stage:
    """Return the stage of one run at all seeds."""
    runs = [replace(run, seed=seed) for seed in seeds]
    return Stage([run for run in runs if run not in found], runs)


def missing_of(stages: Iterable[Stage]) -> list[Run]:
    """Return the missing runs of all stages, without duplicates."""
    return list(dict.fromkeys(run for stage in stages for run in stage.missing))
