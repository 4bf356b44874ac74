"""How long does a step of each method of the study take?

`--fractions 4 8 --json` also prints the ratios of Muon on factors of both ranks. `--methods muon` measures only the
methods that these ratios need. `--size.batch 32` measures steps of 8,192 tokens.

Switches, and new projections of GaLore and APOLLO, happen only in some steps, so their time is averaged over a run. The
time of the optimizer is included. `bench.step` compares more settings, all with AdamW.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn

import dynlora_fn as dl
from bench.quality.dense_methods import packaged
from bench.quality.job import is_inner
from bench.support.harness import Options, finish, start, table
from bench.support.timing import Ratio, Timing, interleave, intervals, values, weighted
from bench.support.training_steps import LR, LibraryStep, StepSize, full_step

GAP = 200  # steps between new projections, as in the study
COMPENSATE = 0.1


@dataclass(frozen=True)
class StepByMethod(Options):
    size: StepSize = field(default_factory=lambda: StepSize(layers=4))
    fractions: tuple[int, ...] = (4,)
    """Width over rank. Full rank, GaLore and APOLLO are timed only at the first."""
    methods: Literal["all", "muon"] = "all"
    """Time all methods, or only the methods that the ratios of Muon need."""
    without: tuple[str, ...] = ()
    """Leave out these methods. ``full rank, torch.optim.Muon`` takes minutes for each step on a CPU."""
    repeats: int = 9
    mode: str = "default"
    """Mode of `torch.compile` for every contender. With `--quick`, nothing is compiled."""


def make_packaged(method: str, rank: int = 1, gap: int = GAP) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Return a function that builds the optimizer of another package for a model.

    torch's Muon has no `rank` and `gap`.
    """

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


class Contenders:
    """The steps to time, by name.

    `occasional` has steps that take the place of another step in a fraction of a run.
    """

    def __init__(self, config: StepByMethod) -> None:
        self.config, self.options = config, {} if config.quick else {"mode": config.mode}
        self.steps: dict[str, Callable[[], Any]] = {}
        self.occasional: dict[str, tuple[str, float]] = {}  # the occasional step and its fraction, by the usual step

    def add_full_rank(self) -> None:
        size, device = self.config.size, self.config.device
        self.steps["full rank"] = full_step(size, device, **self.options)
        of_torch = full_step(size, device, make_optimizer=make_packaged("torch_muon"), **self.options)
        self.steps["full rank, torch.optim.Muon"] = of_torch
        of_inner = muon(lambda name, _: is_inner(name))
        step = LibraryStep(size, 1, device, torch.float32, targets=(), optimizer=of_inner, **self.options)
        self.steps["full rank, Muon"] = step.run

    def add_packaged(self, name: str, method: str, rank: int) -> None:
        rare = f"{name}, new projections"
        for kind, gap in ((name, GAP), (rare, 1)):
            make = make_packaged(method, rank, gap)
            self.steps[kind] = full_step(self.config.size, self.config.device, make_optimizer=make, **self.options)
        self.occasional[name] = (rare, 1 / GAP)

    def add_switched(self, name: str, rank: int, **settings: Any) -> None:
        step = LibraryStep(self.config.size, rank, self.config.device, torch.float32, **settings, **self.options)
        plan = step.first_plan()
        self.steps[name] = step.run
        self.steps[f"{name}, switching"] = lambda: step.run(plan)
        self.occasional[name] = (f"{name}, switching", step.switching_fraction())

    def remove(self, name: str) -> None:
        """Leave out a step, and the step that sometimes takes its place."""
        rare, _ = self.occasional.pop(name, (name, 0.0))
        for step in {name, rare}:
            del self.steps[step]


def measure(config: StepByMethod) -> dict[str, Timing]:
    """Time all contenders in turn."""
    contenders, has_all = Contenders(config), config.methods == "all"
    contenders.add_full_rank()
    for fraction in config.fractions:
        is_first, rank = fraction == config.fractions[0], config.size.width // fraction
        suffix = "" if is_first else f" at d/{fraction}"
        if is_first and has_all:
            contenders.add_packaged("GaLore", "galore", rank)
            contenders.add_packaged("APOLLO", "apollo", rank)
        contenders.add_switched(f"switched{suffix}", rank)
        if has_all:
            contenders.add_switched(f"switched, compensated{suffix}", rank, compensate=COMPENSATE)
        of_factors = muon(lambda _, leaf: not isinstance(leaf, Tensor))
        contenders.add_switched(f"switched, Muon{suffix}", rank, optimizer=of_factors)
        one_side = f"one side, Muon at d/{fraction // 2}"  # with as many trained parameters
        contenders.add_switched(one_side, 2 * rank, optimizer=of_factors, trained="b")
    for name in config.without:
        contenders.remove(name)
    timings = interleave(contenders.steps, repeats=config.repeats, device=config.device)
    if "switched" in timings:
        timings["LoRA"] = timings["switched"]
    for name, (rare, fraction) in contenders.occasional.items():
        timings[name] = weighted(timings[name], timings.pop(rare), fraction)
    return timings


def muon_ratios(timings: dict[str, Timing]) -> dict[str, Ratio]:
    """Return the ratios of a step with Muon on switched factors to full rank."""
    ours, full = timings["switched, Muon"], timings["full rank"]
    ratios = {"muon_over_full": Ratio.of(ours, full)}
    if "full rank, Muon" in timings:
        ratios["muon_over_full_muon"] = Ratio.of(ours, timings["full rank, Muon"])
    if "switched, Muon at d/8" in timings:
        ratios["muon_over_full_eighth"] = Ratio.of(timings["switched, Muon at d/8"], full)
    return ratios


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
    over_full = {name: Ratio.of(timing, timings["full rank"]) for name, timing in timings.items()}
    found = over_full | muon_ratios(timings)
    console.print(found)
    raw = {name: timing.all for name, timing in timings.items()}
    finish(config, {**values(found), "intervals": intervals(found)}, raw)


if __name__ == "__main__":
    main(tyro.cli(StepByMethod))
