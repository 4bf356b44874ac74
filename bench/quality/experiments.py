"""Define the experiments: tables whose rows are swept and then run with all seeds."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from bench.quality.runs import Run
from bench.quality.store import Found
from bench.quality.sweeps import Stage, at_seeds, swept

Rows = dict[str, Stage]  # by their names in the table; all rows are compared with the first
Experiment = Callable[[Found, str], Rows]


COMPENSATE = 0.1  # 0.1 times 2e-2, the factors' rate, is 2e-3, the papers' rate for full rank
LOW: dict[str, Any] = {"base": "int8+bfloat16", "moments": "8bit", "gradients": "bfloat16"}
NAMES = {"lora": "LoRA", "relora": "ReLoRA", "galore": "GaLore", "apollo": "APOLLO"}


def contenders(size: str, fraction: int) -> dict[str, Run]:
    """Return the runs of the low-rank methods.

    None of them draws from a pool. A pool gives the same vectors as the seed until a run has switched as many vectors
    as the pool has idle vectors. These runs switch fewer vectors. `ablations` has runs that switch more.
    """
    switched = Run(size, "switchlora", fraction)
    return {
        **{name: Run(size, method, fraction) for method, name in NAMES.items()},
        "LoRA, Muon": Run(size, "lora", fraction, optimizer="muon"),
        "switched": switched,
        "switched, compensated": replace(switched, compensate=COMPENSATE),
        "switched, Muon": replace(switched, optimizer="muon"),
    }


SMALLER = {"medium": "small", "main": "medium", "large": "medium", "huge": "large"}
# The sweep of another setting starts from the rates that the sweep of these settings has found.
PLAIN: dict[str, Any] = {"coefficients": "jordan", "coupled": 0, "fraction": 4, "beta2": 0.999, "trained": "both"}


def sweep(found: Found, run: Run) -> Stage:
    """Sweep the rates of a method.

    The sweep of the smallest size starts from the papers' rates. Sweeps of larger sizes start from the result of the
    next smaller size, and sweeps of other settings from the result of the plain settings. This takes half as many runs.
    Until such a result is known, the stage has no runs.
    """
    if (plain := replace(run, **PLAIN)) != run:
        start = sweep(found, plain)
        return swept(found, run, start=start.runs[0]) if start.runs else start
    if smaller := SMALLER.get(run.size):
        start = sweep(found, replace(run, size=smaller))
        return swept(found, run, start=start.runs[0]) if start.runs else Stage([], [])
    return swept(found, run)


def full_rank_rows(found: Found, size: str) -> Rows:
    """Return the rows of full rank with AdamW and with Muon."""
    full = Run(size, "full")
    return {"full rank": sweep(found, full), "full rank, Muon": sweep(found, replace(full, optimizer="muon"))}


def methods(found: Found, size: str) -> Rows:
    """Compare all methods at rank d/4."""
    rows = full_rank_rows(found, size)
    rows |= {name: sweep(found, run) for name, run in contenders(size, 4).items()}
    for name in ("switched", "switched, compensated", "switched, Muon"):
        quantized = [replace(run, base="int8+bfloat16") for run in rows[name].runs]
        rows[f"{name}, int8+bfloat16"] = stage_of(found, quantized)
    return rows


def ranks(found: Found, size: str) -> Rows:
    """Compare all methods at ranks d/8 and d/2."""
    rows = full_rank_rows(found, size)
    for fraction in (8, 2):
        rows |= {f"{name}, d/{fraction}": sweep(found, run) for name, run in contenders(size, fraction).items()}
    return rows


def test(found: Found, size: str) -> Rows:
    """Compare all methods on a held-out text that was not used for tuning.

    Rates and seeds are the same as in `methods`.
    """
    finished = {name: stage.runs for name, stage in methods(found, size).items() if not stage.missing}
    return {name: stage_of(found, [replace(run, held_out="test") for run in runs]) for name, runs in finished.items()}


def stage_of(found: Found, runs: Sequence[Run]) -> Stage:
    """Return the stage of runs that need no sweep."""
    return Stage([run for run in runs if run not in found], list(runs))


def ablated(found: Found, baseline: Stage, changes: dict[str, dict]) -> Rows:
    """Return the baseline, and the baseline with each single change, at equal rates."""
    rows = {"baseline": baseline}
    if baseline.missing or not baseline.runs:
        return rows
    return rows | {name: at_seeds(found, replace(baseline.runs[0], **change)) for name, change in changes.items()}


SCHEDULES = {
    "never": {"method": "lora", "start": "switchlora"},
    "ratio 0.05": {"ratio": 0.05},
    "ratio 0.25": {"ratio": 0.25},
    "ratio 0.5": {"ratio": 0.5},
    "no decay": {"ratio": 0.0},
    "no decay, pool": {"ratio": 0.0, "candidates": "pool"},
    "no decay, pool, at random": {"ratio": 0.0, "candidates": "pool", "order": "random"},
    "no decay, ending at 0.8": {"ratio": 0.0, "until": 0.8},
    "ratio 0.1, floor 0.2": {"floor": 0.2},
    "interval 10, freeze 0": {"interval": 10, "freeze": 0},
    "interval 10, freeze 2": {"interval": 10, "freeze": 2},
    "interval 10": {"interval": 10},
    "interval 20": {"interval": 20},
    "interval 80": {"interval": 80},
    "interval 160": {"interval": 160},
    "freeze 0": {"freeze": 0},
    "freeze 2": {"freeze": 2},
    "freeze 10": {"freeze": 10},
    "fold every 5": {"every": 5, "freeze": 5},
    "fold every 20": {"every": 20, "freeze": 5},
}
MOMENTS_AND_VECTORS = {
    "keep": {"rule": "keep", "freeze": 0},
    "reset_thawed": {"rule": "reset_thawed"},
    "transport": {"rule": "transport", "freeze": 0},
    "prune": {"rule": "prune", "freeze": 0},
    "pool, at random": {"candidates": "pool", "order": "random"},
    "outside the span": {"candidates": "orthogonal"},
    "zero-started": {"incoming": "zero"},
    "zero-started, freeze 0": {"incoming": "zero", "freeze": 0},
    "start: lora": {"start": "lora"},
    "start x 0.5": {"start_scale": 0.5},
    "start x 2": {"start_scale": 2.0},
    "side b x 4": {"side_lr": 4.0},
    "side b x 16": {"side_lr": 16.0},
    "side b x 1/4": {"side_lr": 0.25},
}


def ablations(found: Found, size: str) -> Rows:
    """Change one setting at a time of the paper's recipe, at its best rates."""
    return ablated(found, sweep(found, Run(size, "switchlora")), {**SCHEDULES, **MOMENTS_AND_VECTORS})


AT_REST = 2.0**-40  # a multiple of the factors' rate with which only the base, embedding, head and norms learn
COMPENSATIONS = {
    "never switched": {"method": "lora", "start": "switchlora"},
    "every 4th step": {"compensate_every": 4},
    "in int8, every 4th step": {"reduced": "int8", "compensate_every": 4},
    "without": {"compensate": 0.0},
    "rows, half the rate": {"normalize": "rows", "compensate": COMPENSATE / 2},
    "rows": {"normalize": "rows"},
    "half the rate": {"compensate": COMPENSATE / 2},
    "twice the rate": {"compensate": COMPENSATE * 2},
    "every 2nd step": {"compensate_every": 2},
    "every 8th step": {"compensate_every": 8},
    "in int8": {"reduced": "int8"},
    "without, never switched": {"compensate": 0.0, "method": "lora", "start": "switchlora"},
}


def compensation(found: Found, size: str) -> Rows:
    """Change one setting at a time of compensation, at its best rates."""
    baseline = sweep(found, Run(size, "switchlora", compensate=COMPENSATE))
    rows = {"baseline": baseline}
    for run in baseline.runs[:1]:
        dense_lr, compensate = run.dense_lr / AT_REST, run.compensate / AT_REST
        at_rest = replace(run, lr=run.lr * AT_REST, dense_lr=dense_lr, compensate=compensate)
        rows["only compensation, factors at rest"] = at_seeds(found, at_rest)
    return rows | ablated(found, baseline, COMPENSATIONS)


def one_side(found: Found, size: str) -> Rows:
    """Compare training both factors with training one factor at twice the rank.

    Both train about as many parameters.
    """
    rows = full_rank_rows(found, size)
    for optimizer, name in (("muon", ", Muon"), ("adamw", "")):
        for both, one in ((4, 2), (2, 1)):
            run = Run(size, "switchlora", both, optimizer=optimizer)
            rows[f"both sides, d/{both}{name}"] = sweep(found, run)
            rows[f"one side, d/{one}{name}"] = sweep(found, replace(run, fraction=one, trained="b"))
    return rows


EXPERIMENTS: dict[str, Experiment] = {
    "methods": methods,
    "ranks": ranks,
    "test": test,
    "ablations": ablations,
    "compensation": compensation,
    "one_side": one_side,
}
