"""Change one setting at a time of switched and of full-rank Muon."""

from dataclasses import replace

from bench.quality.experiments import LOW, Rows, ablated, at_seeds, sweep
from bench.quality.runs import Run
from bench.quality.store import Found

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
    full = sweep(found, Run(size, "full", optimizer="muon"))
    rows["full rank"] = full
    if full.missing or rows["baseline"].missing:
        return rows
    coefficients = {name: change for name, change in COEFFICIENTS.items() if "coupled" not in change}
    changes = {**coefficients, **PRECISION, **DECAYS}
    dense = {name: change for name, change in changes.items() if "fraction" not in change}
    for name, change in dense.items():
        rows[f"full rank, {name}"] = at_seeds(found, replace(full.runs[0], **change))
    return rows
