"""How far does a weight in low precision drift over the switches of a run?

The format of the base, its residual and the interval between folds vary. A copy of the weight in float64 is switched
too, and gives the exact result.

- ``error`` is the error of the weight that products use.
- ``over once`` is this error over the error of quantizing the exact base a single time.
- ``kept`` is the error of codes and residual together, from which later folds start.
- ``deferred`` contenders store the differences of several folds exactly, as vectors, and fold them together.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import tyro

import dynlora_fn as dl
from bench.support.harness import Options, finish, start, table
from dynlora_fn.bases._base import as_base

BASES = ("bfloat16", "int8", "float8", "nf4")
RESIDUALS = ("none", "int8", "bfloat16")


@dataclass(frozen=True)
class Drift(Options):
    width: int = 512
    rank: int = 128
    steps: int = 40_000
    """Number of steps of the schedule."""
    every: tuple[int, ...] = (1, 8, 20)
    """Numbers of steps between two folds, each measured separately."""
    bases: tuple[str, ...] = BASES
    residuals: tuple[str, ...] = RESIDUALS
    deferred: int = 8
    """Number of folds that the deferred contenders fold together. 0 leaves these contenders out."""


Errors = dict[str, float]  # the errors of one contender, by kind


def contenders(config: Drift, weight: dl.LowRank, vectors: int) -> dict[str, dl.LowRank]:
    """Return the weight in every format.

    Args:
        config: The options.
        weight: The weight in float64.
        vectors: The number of vectors that each fold adds.
    """
    params = {"float32+none": weight._replace(base=weight.base.float())}
    for base in config.bases:
        for residual in config.residuals:
            kind: Any = None if residual == "none" else residual
            params[f"{base}+{residual}"] = dl.bases.quantize(weight, base, residual=kind)
    if config.deferred:
        pending = config.deferred * vectors
        params |= {f"{name} deferred": dl.bases.defer(param, vectors=pending) for name, param in params.items()}
    return params


def exact_weight(config: Drift) -> dl.LowRank:
    """Build the weight with its base in float64.

    Factors may remain in float32, because folds round only the base.
    """
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(config.width, config.width, generator=generator, dtype=torch.float64)
    (param,) = dl.init({"w": weight.to(config.device)}, rank=config.rank, seed=0, targets=["w"]).values()
    return param


def errors(param: dl.LowRank, exact: dl.LowRank, name: str) -> Errors:
    """Return the errors of a weight, relative in the Frobenius norm."""
    dense = dl.materialize(exact)
    stored = as_base(param.base).map_folded(lambda base: as_base(base).exact(torch.float64))
    error = dl.bases.drift(param, dense).item()
    kind, _ = name.split("+")
    once = (
        exact._replace(base=exact.base.float()) if kind == "float32" else dl.bases.quantize(exact, kind, residual=None)
    )
    return {
        "error": error,
        "kept": dl.bases.drift(param._replace(base=stored), dense).item(),
        "over_once": error / dl.bases.drift(once, dense).item(),
    }


def run(config: Drift, every: int) -> Iterator[tuple[int, dict[str, Errors]]]:
    """Yield the number of folds and the errors of all contenders.

    It yields twice: after a quarter of the steps and at the end.
    """
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
    raw: dict[int, list[dict[str, Errors]]] = {}
    for every in config.every:
        raw[every] = []
        for folds, by_name in run(config, every):
            raw[every].append(by_name)
            rows = [[name, error["error"], error["over_once"], error["kept"]] for name, error in by_name.items()]
            title = f"every {every} steps, {folds} folds, {config.width}x{config.width}, rank {config.rank}"
            console.print(table(title, ["base+residual", "error", "over once", "kept"], rows))
    results: dict[str, float] = {}
    early, late = raw[config.every[0]]
    for name in late:
        results[name] = late[name]["error"]
        results[f"{name} over once"] = late[name]["over_once"]
        results[f"{name} kept"] = late[name]["kept"]
        results[f"{name} growth"] = late[name]["error"] / early[name]["error"]
    console.print(results)
    finish(config, results, raw)


if __name__ == "__main__":
    main(tyro.cli(Drift))
