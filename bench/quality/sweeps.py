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


class Stage(NamedTuple):
    """What is still to be run, or the answer."""

    missing: list[Run]
    runs: list[Run]  # of the best rate, one for each seed


def loss_of(found: Found, run: Run) -> float:
    loss = found[run]["loss"]
    return math.inf if loss is None else loss


def swept(found: Found, run: Run, *, seeds: Sequence[int] = SEEDS) -> Stage:
    """The best rate of a grid by factors of 2 at the first seed, and that rate at all seeds.

    The grid has three rates around the papers' and grows at an end for as long as the best one lies there: it ends with
    a rate on either side of the best that is worse.
    """
    center = CENTERS[run.method]
    exponents = [-1, 0, 1]
    while True:
        runs = {exponent: replace(run, lr=center * 2.0**exponent, seed=seeds[0]) for exponent in exponents}
        if missing := [one for one in runs.values() if one not in found]:
            return Stage(missing, [])
        best = min(exponents, key=lambda exponent: loss_of(found, runs[exponent]))
        if best == exponents[0]:
            exponents = [best - 1, *exponents]
        elif best == exponents[-1]:
            exponents = [*exponents, best + 1]
        else:
            return at_seeds(found, runs[best], seeds)


def at_seeds(found: Found, run: Run, seeds: Sequence[int] = SEEDS) -> Stage:
    runs = [replace(run, seed=seed) for seed in seeds]
    return Stage([one for one in runs if one not in found], runs)


def missing_of(stages: Iterable[Stage]) -> list[Run]:
    return list(dict.fromkeys(run for stage in stages for run in stage.missing))
