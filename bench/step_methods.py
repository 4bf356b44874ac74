"""How long is a step of each method of the study, by packages of its own?

Those that do something every so many steps, switching and GaLore's and APOLLO's new projections, are averaged over a
run; the optimizer's time is in it, which `step` has for AdamW alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import tyro
from torch import nn

import dynlora_fn as dl
from bench.common import Common, Timing, finish, interleave, start, table
from bench.quality.dense_methods import packaged
from bench.quality.job import is_inner
from bench.training import LR, Ours, Size, full_step

GAP = 200  # steps between new projections, as in the study
COMPENSATE = 0.1


@dataclass(frozen=True)
class StepMethods(Common):
    size: Size = field(default_factory=lambda: Size(layers=4))
    fraction: int = 4
    """The rank is width over it."""
    repeats: int = 9
    mode: str = "default"
    """Of `torch.compile`, for all of them; nothing is compiled with `--quick`."""


def make_packaged(method: str, rank: int, gap: int) -> Callable[[nn.Module], torch.optim.Optimizer]:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        named = dict(model.named_parameters())
        low = [parameter for name, parameter in named.items() if is_inner(name)]
        rest = [parameter for name, parameter in named.items() if not is_inner(name)]
        return packaged(method, low, rest, lr=LR, rank=rank, gap=gap)

    return make


def muon(choose: Callable[[str, Any], bool]) -> dl.optim.Transform:
    return dl.optim.multi_transform(
        {"muon": dl.optim.muon(), "adamw": dl.optim.adamw()},
        lambda name, leaf: "muon" if choose(name, leaf) else "adamw",
    )


def measure(config: StepMethods) -> dict[str, Timing]:
    size, device, dtype = config.size, config.device, torch.float32
    rank, options = size.width // config.fraction, {} if config.quick else {"mode": config.mode}
    contenders = {"full rank": full_step(size, device, **options)}
    often = {}  # what is done now and then, in what share of the steps
    for name, method in (("GaLore", "galore"), ("APOLLO", "apollo")):
        for kind, gap in ((name, GAP), (f"{name}, new projections", 1)):
            make = make_packaged(method, rank, gap)
            contenders[kind] = full_step(size, device, make_optimizer=make, **options)
        often[name] = (f"{name}, new projections", 1 / GAP)

    def add(name: str, **settings: Any) -> None:
        ours = Ours(size, rank, device, dtype, **settings, **options)
        plan = ours.plan_at(int(ours.schedule.interval))
        contenders[name] = ours.run
        contenders[f"{name}, switching"] = lambda: ours.run(plan)
        often[name] = (f"{name}, switching", ours.share_that_switches())

    of_inner = muon(lambda name, _: is_inner(name))
    contenders["full rank, Muon"] = Ours(size, rank, device, dtype, targets=(), optimizer=of_inner, **options).run
    add("switched")
    add("switched, compensated", compensate=COMPENSATE)
    add("switched, Muon", optimizer=muon(lambda _, leaf: isinstance(leaf, dl.Factors)))
    timings = interleave(contenders, repeats=config.repeats, device=device)
    timings["LoRA"] = timings["switched"]
    for name, (other, share) in often.items():
        pairs = zip(timings[name].all, timings.pop(other).all, strict=True)
        timings[name] = Timing.of([(1 - share) * plain + share * now for plain, now in pairs])
    return timings


def main(config: StepMethods) -> None:
    if config.quick:
        size = Size(width=64, layers=2, batch=2, length=64, heads=2)
        config = StepMethods(**{**vars(config), "size": size, "repeats": 3})
    console = start(config)
    timings = measure(config)
    full = timings["full rank"].median
    rows = [[name, *(1e3 * value for value in timing[:3]), timing.median / full] for name, timing in timings.items()]
    title = f"one step in ms, {config.size.tokens} tokens, width {config.size.width}, {config.size.layers} layers"
    console.print(table(title, ["", "lower quartile", "median", "upper quartile", "over full"], rows))
    results = {name: timing.median / full for name, timing in timings.items()}
    finish(config, results, {name: timing.all for name, timing in timings.items()})


if __name__ == "__main__":
    main(tyro.cli(StepMethods))
