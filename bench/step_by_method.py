"""How long is a step of each method of the study?

Other methods run from their packages. Switching and the new projections of GaLore and APOLLO happen only in some steps,
so their time is averaged over a run. The optimizer's time is included. `bench.step` compares more settings, all with
AdamW.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import tyro
from torch import Tensor, nn

import dynlora_fn as dl
from bench.quality.dense_methods import packaged
from bench.quality.job import is_inner
from bench.support.harness import Options, finish, start, table
from bench.support.timing import Timing, interleave, weighted
from bench.support.training_steps import LR, LibraryStep, StepSize, full_step

GAP = 200  # steps between new projections, as in the study
COMPENSATE = 0.1


@dataclass(frozen=True)
class StepByMethod(Options):
    size: StepSize = field(default_factory=lambda: StepSize(layers=4))
    fraction: int = 4
    """Width over rank."""
    repeats: int = 9
    mode: str = "default"
    """Mode of `torch.compile` for every contender. With `--quick`, nothing is compiled."""


def make_packaged(method: str, rank: int, gap: int) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Return a function that makes GaLore's or APOLLO's optimizer of a model."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        named = dict(model.named_parameters())
        low = [parameter for name, parameter in named.items() if is_inner(name)]
        rest = [parameter for name, parameter in named.items() if not is_inner(name)]
        return packaged(method, low, rest, lr=LR, rank=rank, gap=gap)

    return make


def muon(choose: Callable[[str, Any], bool]) -> dl.optim.Transform:
    """Return Muon for the leaves that `choose` selects and AdamW for the others."""
    return dl.optim.multi_transform(
        {"muon": dl.optim.muon(), "adamw": dl.optim.adamw()},
        lambda name, leaf: "muon" if choose(name, leaf) else "adamw",
    )


def measure(config: StepByMethod) -> dict[str, Timing]:
    """Time all contenders in turn."""
    size, device, dtype = config.size, config.device, torch.float32
    rank, options = size.width // config.fraction, {} if config.quick else {"mode": config.mode}
    contenders = {"full rank": full_step(size, device, **options)}
    occasional = {}  # by method: the step that it takes now and then, and in which fraction of the steps
    for name, method in (("GaLore", "galore"), ("APOLLO", "apollo")):
        for kind, gap in ((name, GAP), (f"{name}, new projections", 1)):
            make = make_packaged(method, rank, gap)
            contenders[kind] = full_step(size, device, make_optimizer=make, **options)
        occasional[name] = (f"{name}, new projections", 1 / GAP)

    def add(name: str, **settings: Any) -> None:
        step = LibraryStep(size, rank, device, dtype, **settings, **options)
        plan = step.first_plan()
        contenders[name] = step.run
        contenders[f"{name}, switching"] = lambda: step.run(plan)
        occasional[name] = (f"{name}, switching", step.switching_fraction())

    of_inner = muon(lambda name, _: is_inner(name))
    full_muon = LibraryStep(size, rank, device, dtype, targets=(), optimizer=of_inner, **options)
    contenders["full rank, Muon"] = full_muon.run
    add("switched")
    add("switched, compensated", compensate=COMPENSATE)
    add("switched, Muon", optimizer=muon(lambda _, leaf: not isinstance(leaf, Tensor)))
    timings = interleave(contenders, repeats=config.repeats, device=device)
    timings["LoRA"] = timings["switched"]
    for name, (rare, fraction) in occasional.items():
        timings[name] = weighted(timings[name], timings.pop(rare), fraction)
    return timings


def main(config: StepByMethod) -> None:
    if config.quick:
        size = StepSize(width=64, layers=2, batch=2, length=64, heads=2)
        config = StepByMethod(**{**vars(config), "size": size, "repeats": 3})
    console = start(config)
    timings = measure(config)
    full = timings["full rank"].median
    rows = [[name, *(1e3 * value for value in timing[:3]), timing.median / full] for name, timing in timings.items()]
    title = f"one step in ms, {config.size.tokens} tokens, width {config.size.width}, {config.size.layers} layers"
    console.print(table(title, ["", "lower quartile", "median", "upper quartile", "over full"], rows))
    results = {name: timing.median / full for name, timing in timings.items()}
    finish(config, results, {name: timing.all for name, timing in timings.items()})


if __name__ == "__main__":
    main(tyro.cli(StepByMethod))
