"""What each experiment asks: rows, each of which is swept and run with all seeds."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from bench.quality.runs import Run
from bench.quality.store import Found
from bench.quality.sweeps import Stage, at_seeds, swept

Rows = dict[str, Stage]  # by what the table calls them; the first is what the others are compared with
Experiment = Callable[[Found, str], Rows]


COMPENSATE = 0.1  # over the factors' rate of 2e-2: 2e-3
NAMES = {"lora": "LoRA", "relora": "ReLoRA", "galore": "GaLore", "apollo": "APOLLO"}


def contenders(size: str, fraction: int) -> dict[str, Run]:
    """Full rank apart. The last one folds what the factors miss into the base, at the papers' rate for full rank.

    A pool is none of them: as long as a run switches fewer vectors than a pool has idle ones, as it does here, it hands
    out the same as a seed. `ablations` has runs that switch more.
    """
    switched = Run(size, "switchlora", fraction)
    return {
        **{name: Run(size, method, fraction) for method, name in NAMES.items()},
        "LoRA, Muon": Run(size, "lora", fraction, optimizer="muon"),
        "switched": switched,
        "switched, compensated": replace(switched, compensate=COMPENSATE),
        "switched, Muon": replace(switched, optimizer="muon"),
    }


SMALLER = {"medium": "small", "main": "medium", "large": "medium"}


def sweep(found: Found, run: Run) -> Stage:
    """From the papers' rates at the smallest size. The others start where the size before ended, other ranks where d/4
    did: that takes half as many runs. Until it has ended there, the stage has neither runs nor missing ones.
    """
    if run.fraction != 4:
        start = sweep(found, replace(run, fraction=4))
        return swept(found, run, start=start.runs[0]) if start.runs else start
    if smaller := SMALLER.get(run.size):
        start = sweep(found, replace(run, size=smaller))
        return swept(found, run, start=start.runs[0]) if start.runs else Stage([], [])
    return swept(found, run)


def of_full_rank(found: Found, size: str) -> Rows:
    full = Run(size, "full")
    return {"full rank": sweep(found, full), "full rank, Muon": sweep(found, replace(full, optimizer="muon"))}


def methods(found: Found, size: str) -> Rows:
    """All methods at rank d/4."""
    rows = of_full_rank(found, size)
    rows |= {name: sweep(found, run) for name, run in contenders(size, 4).items()}
    for name in ("switched", "switched, compensated", "switched, Muon"):
        quantized = [replace(run, base="int8+bfloat16") for run in rows[name].runs]
        rows[f"{name}, int8+bfloat16"] = of_runs(found, quantized)
    return rows


def ranks(found: Found, size: str) -> Rows:
    """All methods at rank d/8 and d/2."""
    rows = of_full_rank(found, size)
    for fraction in (8, 2):
        rows |= {f"{name}, d/{fraction}": sweep(found, run) for name, run in contenders(size, fraction).items()}
    return rows


def test(found: Found, size: str) -> Rows:
    """All methods at the rates and seeds of `methods`, by their loss on a text that no rate was chosen by."""
    finished = {name: stage.runs for name, stage in methods(found, size).items() if not stage.missing}
    return {name: of_runs(found, [replace(run, held_out="test") for run in runs]) for name, runs in finished.items()}


def of_runs(found: Found, runs: Sequence[Run]) -> Stage:
    return Stage([run for run in runs if run not in found], list(runs))


def ablated(found: Found, baseline: Stage, changes: dict[str, dict]) -> Rows:
    """Each change alone, at the baseline's rate."""
    rows = {"baseline": baseline}
    if baseline.missing:
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
RULES = {
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
    """One setting at a time of the paper's recipe, seeded, at its best rate."""
    return ablated(found, sweep(found, Run(size, "switchlora")), {**SCHEDULES, **RULES})


ALONE = 2.0**-40  # of the factors' rate: the base alone learns, and embedding, head and norms
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
    """What is folded into the base beside the factors, at its best rates, and each change of it alone."""
    baseline = sweep(found, Run(size, "switchlora", compensate=COMPENSATE))
    rows = {"baseline": baseline}
    for run in baseline.runs[:1]:
        alone = replace(run, lr=run.lr * ALONE, dense_lr=run.dense_lr / ALONE, compensate=run.compensate / ALONE)
        rows["alone, factors at rest"] = at_seeds(found, alone)
    return rows | ablated(found, baseline, COMPENSATIONS)


EXPERIMENTS: dict[str, Experiment] = {
    "methods": methods,
    "ranks": ranks,
    "test": test,
    "ablations": ablations,
    "compensation": compensation,
}
