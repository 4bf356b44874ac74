"""How long does a training step take?

Full rank, PEFT's LoRA, and this library with and without switching are compared. ``switched`` is an average over a run
of 40,000 steps: a step that switches is weighted with the fraction of such steps. It is measured at the start of the
schedule, where most vectors are switched.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import tyro

from bench.support.harness import Options, finish, start, table
from bench.support.timing import Ratio, Timing, interleave, intervals, values, weighted
from bench.support.training_steps import LibraryStep, StepSize, compile_blocks, full_step, peft_step


@dataclass(frozen=True)
class Step(Options):
    size: StepSize = field(default_factory=StepSize)
    fractions: tuple[int, ...] = (4, 8)
    """The ranks, each as width over rank."""
    dtype: str = "float32"
    """Dtype of the products, by autocast. Weights and moments are float32."""
    bases: tuple[str, ...] = ()
    """Also measure bases in low precision at the first rank, each as BASE+RESIDUAL (``int8+bfloat16``)."""
    blocks: bool = False
    """Also measure a step at the first rank with blocks that are compiled one by one, inside an eager step."""
    repeats: int = 20
    eager: bool = False
    """Do not compile."""
    mode: str = "default"
    """Mode of `torch.compile` for every contender. With `--quick`, nothing is compiled."""


def measure(config: Step) -> dict[str, Timing]:
    """Time all contenders in turn."""
    size, device, dtype = config.size, config.device, getattr(torch, config.dtype)
    options = {} if config.eager or config.quick else {"mode": config.mode}
    contenders = {"full": full_step(size, device, dtype, **options)}
    switching_fractions = {}

    def add(kind: str, rank: int, **settings: Any) -> None:
        step = LibraryStep(size, rank, device, dtype, **settings)
        plan = step.first_plan()
        contenders[f"static {kind}"] = step.run
        contenders[f"switching {kind}"] = lambda: step.run(plan)
        switching_fractions[kind] = step.switching_fraction()

    for fraction in config.fractions:
        contenders[f"peft d/{fraction}"] = peft_step(size, size.width // fraction, device, dtype, **options)
        add(f"d/{fraction}", size.width // fraction, **options)
    for name in config.bases:
        base, residual = name.split("+")
        storage = {"base": base, "residual": None if residual == "none" else residual}
        add(f"{name} d/{config.fractions[0]}", size.width // config.fractions[0], **storage, **options)
    if config.blocks:
        wrap = partial(compile_blocks, **options) if options else None
        add(f"blocks d/{config.fractions[0]}", size.width // config.fractions[0], wrap=wrap)
    timings = interleave(contenders, repeats=config.repeats, device=device)
    for kind, fraction in switching_fractions.items():
        timings[f"switched {kind}"] = weighted(timings[f"static {kind}"], timings[f"switching {kind}"], fraction)
    return timings


def ratios(timings: dict[str, Timing], fractions: tuple[int, ...], bases: tuple[str, ...]) -> dict[str, Ratio]:
    """Return the ratios of medians that the benchmark reports."""

    def ratio(name: str, other: str) -> Ratio:
        return Ratio.of(timings[name], timings[other])

    first, last = fractions[0], fractions[-1]
    blocks = f"switched blocks d/{first}"
    return {
        "switched_over_full": ratio(f"switched d/{first}", "full"),
        "switched_over_full_eighth": ratio(f"switched d/{last}", "full"),
        "switched_over_static": ratio(f"switched d/{first}", f"static d/{first}"),
        "ours_over_peft": ratio(f"switched d/{first}", f"peft d/{first}"),
        "ours_over_peft_eighth": ratio(f"switched d/{last}", f"peft d/{last}"),
        **{f"{base}_over_float32": ratio(f"switched {base} d/{first}", f"switched d/{first}") for base in bases},
        **({"blocks_over_one_graph": ratio(blocks, f"switched d/{first}")} if blocks in timings else {}),
    }


def main(config: Step) -> None:
    if config.quick:
        size = StepSize(width=64, layers=2, batch=2, length=64, heads=2)
        config = replace(config, size=size, repeats=5)
    console = start(config)
    timings = measure(config)
    full = timings["full"].median
    rows = [[name, *(1e3 * value for value in timing[:3]), timing.median / full] for name, timing in timings.items()]
    kind = "eager" if config.eager else "compiled"
    title = f"one {kind} step in ms, {config.dtype}, {config.size.tokens} tokens, width {config.size.width}"
    console.print(table(title, ["", "lower quartile", "median", "upper quartile", "over full"], rows))
    found = ratios(timings, config.fractions, config.bases)
    console.print(found)
    finish(
        config, {**values(found), "intervals": intervals(found)}, {name: timing.all for name, timing in timings.items()}
    )


if __name__ == "__main__":
    main(tyro.cli(Step))
