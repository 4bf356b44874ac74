"""How far does a weight in low precision drift over a run's switches? Every base, residual and fold interval.

The factors stand still but for the switches, so that the exact weight, kept in float64 beside, is all that there is to
know. ``error`` is that of the weight that products see, ``kept`` that of codes and residual together, which all later
folds start from. ``over once`` compares the former with quantizing the exact base a single time. ``deferred`` ones hold
the differences of several folds as vectors, exactly, and fold them together.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import tyro

import dynlora_fn as dl
from bench.common import Common, finish, start, table
from dynlora_fn.bases._ops import decode_exact as with_residual

BASES = ("bfloat16", "int8", "float8", "nf4")
RESIDUALS = ("none", "int8", "bfloat16")


@dataclass(frozen=True)
class Drift(Common):
    width: int = 512
    rank: int = 128
    steps: int = 40_000
    """Of the schedule."""
    every: tuple[int, ...] = (1, 8, 20)
    """Steps between two folds."""
    bases: tuple[str, ...] = BASES
    residuals: tuple[str, ...] = RESIDUALS
    deferred: int = 8
    """Folds that wait for each other, in a second contender of each base and residual; 0 for none."""


def contenders(config: Drift, weight: dl.LowRank, vectors: int) -> dict[str, dl.LowRank]:
    """Of weights whose folds bring so many vectors each."""
    made = {"float32+none": weight._replace(base=weight.base.float())}
    for base in config.bases:
        for residual in config.residuals:
            kind: Any = None if residual == "none" else residual
            made[f"{base}+{residual}"] = dl.bases.quantize(weight, base, residual=kind)
    if config.deferred:
        waiting = {
            f"{name} deferred": dl.bases.defer(param, vectors=config.deferred * vectors) for name, param in made.items()
        }
        made |= waiting
    return made


def exact_weight(config: Drift) -> dl.LowRank:
    """In float64 but for the factors: the base is what keeps the weight."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(config.width, config.width, generator=generator, dtype=torch.float64)
    (param,) = dl.init({"w": weight.to(config.device)}, rank=config.rank, seed=0, targets=["w"]).values()
    return param


def errors(param: dl.LowRank, exact: dl.LowRank, name: str) -> dict[str, float]:
    """Relative, in Frobenius norms."""
    dense = dl.materialize(exact)
    base = param.base.base if isinstance(param.base, dl.bases.Deferred) else param.base
    kept = base if isinstance(base, torch.Tensor) else with_residual(base.codes, base.residual, torch.float64)
    kept = param.base._replace(base=kept.double()) if isinstance(param.base, dl.bases.Deferred) else kept.double()
    error = dl.bases.drift(param, dense).item()
    kind, _ = name.split("+")
    once = (
        exact._replace(base=exact.base.float()) if kind == "float32" else dl.bases.quantize(exact, kind, residual=None)
    )
    return {
        "error": error,
        "kept": dl.bases.drift(param._replace(base=kept), dense).item(),
        "over_once": error / dl.bases.drift(once, dense).item(),
    }


def run(config: Drift, every: int) -> Iterator[tuple[int, dict[str, dict[str, float]]]]:
    """The errors of all contenders after a quarter of the steps and at the end, and how many folds there were."""
    exact = exact_weight(config)
    schedule = dl.schedules.switchlora(config.steps, every=every)
    first = schedule(0, {"w": exact})["w"]
    params = contenders(config, exact, first.b.slots.shape[-1] + first.a.slots.shape[-1])
    folds = 0
    for step in range(config.steps):
        if schedule.switches(step, {"w": exact}):
            folds += 1
            plan = schedule(step, {"w": exact})["w"]
            incoming = dl.candidates(exact, plan)
            exact = dl.switch(exact, plan, incoming=incoming).param
            params = {name: dl.switch(param, plan, incoming=incoming).param for name, param in params.items()}
            if config.deferred and folds % config.deferred == 0:
                params = dl.bases.fold_pending(params)
        if step + 1 in (config.steps // 4, config.steps):
            yield folds, {name: errors(param, exact, name) for name, param in params.items()}


def main(config: Drift) -> None:
    if config.quick:
        config = Drift(**{**vars(config), "width": 64, "rank": 16, "steps": 400, "every": (1, 8)})
    console = start(config)
    found: dict[int, list[dict[str, dict[str, float]]]] = {}
    for every in config.every:
        found[every] = []
        for folds, at in run(config, every):
            found[every].append(at)
            rows = [[name, one["error"], one["over_once"], one["kept"]] for name, one in at.items()]
            title = f"every {every} steps, {folds} folds, {config.width}x{config.width}, rank {config.rank}"
            console.print(table(title, ["base+residual", "error", "over once", "kept"], rows))
    results: dict[str, float] = {}
    early, late = found[config.every[0]]
    for name in late:
        results[name] = late[name]["error"]
        results[f"{name} over once"] = late[name]["over_once"]
        results[f"{name} kept"] = late[name]["kept"]
        results[f"{name} growth"] = late[name]["error"] / early[name]["error"]
    console.print(results)
    finish(config, results, found)


if __name__ == "__main__":
    main(tyro.cli(Drift))
