"""Change one setting at a time of switched and of full-rank Muon."""

from dataclasses import replace
from typing import Any

from bench.quality.experiments import LOW, Rows, ablated, at_seeds, sweep
from bench.quality.runs import Run
from bench.quality.store import Found
from bench.quality.sweeps import Stage, dense_neighbors, swept

COEFFICIENTS = {
    "Polar Express, 5 steps": {"coefficients": "polar_express_5"},
    "Polar Express, 8 steps": {"coefficients": "polar_express_8"},
    "coupled, 1 projection": {"coefficients": "polar_express_8", "coupled": 1},
    "coupled, 3 projections": {"coefficients": "polar_express_8", "coupled": 3},
}
PRECISION = {
    "moments in 8 bits": {"moments": "8bit"},
    "gradients in bfloat16": {"gradients": "bfloat16"},
    "int8 base, bfloat16 residual": {"base": "int8+bfloat16"},
    "all three": LOW,
    "all three, d/2": {**LOW, "fraction": 2},
}
RANKS = {
    "d/2": {"fraction": 2},
    "one side, d/2": {"fraction": 2, "trained": "b"},
    "one side, d": {"fraction": 1, "trained": "b"},
}
SCHEDULES = {
    "never switched": {"method": "lora", "start": "switchlora"},
    "interval 10": {"interval": 10},
    "interval 160": {"interval": 160},
    "ratio 0.5": {"ratio": 0.5},
    "no decay, ending at 0.8": {"ratio": 0.0, "until": 0.8},
    "freeze 0": {"freeze": 0},
    "transport": {"rule": "transport", "freeze": 0},
    "keep": {"rule": "keep", "freeze": 0},
}
DECAYS = {"weight decay 0.1": {"weight_decay": 0.1}, "weight decay 1": {"weight_decay": 1.0}}

# Changes of runs in low precision, with the coefficients of Polar Express.
SHAPES: dict[str, dict[str, Any]] = {
    "d/4": {},
    "d/2": {"fraction": 2},
    "one side, d/2": {"fraction": 2, "trained": "b"},
}
SMALLER: dict[str, dict[str, Any]] = {
    "low precision": {},
    "factors in bfloat16": {"factors": "bfloat16"},
    "nf4 base, bfloat16 residual": {"base": "nf4+bfloat16"},
    # Without a residual each fold adds an error. Folds are rare with a large `every`.
    "nf4 base, no residual, folds every 20 steps": {"base": "nf4", "every": 20},
}
SMALLER_AT_ONE_RANK: dict[str, dict[str, Any]] = {
    "nf4 base, no residual": {"base": "nf4"},
    "int8 base, bfloat16 residual, folds every 20 steps": {"every": 20},
    "nvfp4 base, bfloat16 residual": {"base": "nvfp4+bfloat16"},
}


def muon_ablations(found: Found, size: str) -> Rows:
    """Change one setting at a time of Muon on factors at rank d/4, at its best rates.

    Changes of rank and of sides have the same rates too, without a sweep. Full-rank Muon has its best rates, and each
    change that applies to it.
    """
    rows = ablated(
        found,
        sweep(found, Run(size, "switchlora", optimizer="muon")),
        {**COEFFICIENTS, **PRECISION, **RANKS, **SCHEDULES, **DECAYS},
    )
    if rows["baseline"].runs:
        rows |= smaller(found, replace(rows["baseline"].runs[0], **LOW, coefficients="polar_express_8"))
    full = sweep(found, Run(size, "full", optimizer="muon"))
    rows["full rank"] = full
    if full.missing or rows["baseline"].missing or not full.runs:
        return rows
    coefficients = {name: change for name, change in COEFFICIENTS.items() if "coupled" not in change}
    changes = {**coefficients, **PRECISION, **DECAYS}
    dense = {name: change for name, change in changes.items() if "fraction" not in change}
    for name, change in dense.items():
        rows[f"full rank, {name}"] = at_seeds(found, replace(full.runs[0], **change))
    return rows


def smaller(found: Found, low: Run) -> Rows:
    """Change one setting at a time of a run in low precision, at its rates.

    SCALE has a different rate of embedding, head and norms, which is swept at rank d/4.
    """
    rows = {}
    for name, change in SMALLER.items():
        for shape, form in SHAPES.items():
            rows[f"{name}, {shape}"] = at_seeds(found, replace(low, **change, **form))
    rows |= {f"{name}, d/4": at_seeds(found, replace(low, **change)) for name, change in SMALLER_AT_ONE_RANK.items()}
    scale = swept(found, replace(low, dense_optimizer="scale"), start=low, near=dense_neighbors)
    for shape, form in SHAPES.items():
        runs = [replace(run, **form) for run in scale.runs]
        rows[f"SCALE, {shape}"] = at_seeds(found, runs[0]) if runs else Stage(scale.missing, [])
    return rows
