"""How long is a training step? Full rank, PEFT's LoRA, and this library without and with switching.

``switched`` is averaged over the schedule of a run of 40,000 steps: the time of a step in which vectors are
switched, at the start, where they are most, and of one without, each weighted by how many there are.
"""

from dataclasses import dataclass, field, replace

import torch
import tyro

from bench.common import Common, Timing, finish, interleave, start, table
from bench.training import Ours, Size, full_step, peft_step


@dataclass(frozen=True)
class Step(Common):
    size: Size = field(default_factory=Size)
    fractions: tuple[int, ...] = (4, 8)
    """Ranks, as width over rank."""
    dtype: str = "float32"
    """That of the products, by autocast; weights and moments are float32."""
    bases: tuple[str, ...] = ()
    """Such as ``int8+bfloat16``: also with bases in low precision and a residual, at the first of the ranks."""
    repeats: int = 20
    eager: bool = False
    """Nothing is compiled."""
    mode: str = "default"
    """Of `torch.compile`, for all of them; nothing is compiled with `--quick`."""


def measure(config: Step) -> dict[str, Timing]:
    size, device, dtype = config.size, config.device, getattr(torch, config.dtype)
    options = {} if config.eager or config.quick else {"mode": config.mode}
    contenders = {"full": full_step(size, device, dtype, **options)}
    shares = {}

    def add(kind: str, rank: int, **kept: str | None) -> None:
        ours = Ours(size, rank, device, dtype, **kept, **options)
        plan = ours.plan_at(int(ours.schedule.interval))
        contenders[f"static {kind}"] = ours.run
        contenders[f"switching {kind}"] = lambda: ours.run(plan)
        shares[kind] = ours.share_that_switches()

    for fraction in config.fractions:
        contenders[f"peft d/{fraction}"] = peft_step(size, size.width // fraction, device, dtype, **options)
        add(f"d/{fraction}", size.width // fraction)
    for name in config.bases:
        base, residual = name.split("+")
        kept = {"base": base, "residual": None if residual == "none" else residual}
        add(f"{name} d/{config.fractions[0]}", size.width // config.fractions[0], **kept)
    timings = interleave(contenders, repeats=config.repeats, device=device)
    for kind, share in shares.items():
        pairs = zip(timings[f"static {kind}"].all, timings[f"switching {kind}"].all, strict=True)
        timings[f"switched {kind}"] = Timing.of(
            [(1 - share) * static + share * switching for static, switching in pairs]
        )
    return timings


def ratios(timings: dict[str, Timing], fractions: tuple[int, ...], bases: tuple[str, ...]) -> dict[str, float]:
    def ratio(name: str, other: str) -> float:
        return timings[name].median / timings[other].median

    first, last = fractions[0], fractions[-1]
    return {
        "switched_over_full": ratio(f"switched d/{first}", "full"),
        "switched_over_full_eighth": ratio(f"switched d/{last}", "full"),
        "switched_over_static": ratio(f"switched d/{first}", f"static d/{first}"),
        "ours_over_peft": ratio(f"switched d/{first}", f"peft d/{first}"),
        "ours_over_peft_eighth": ratio(f"switched d/{last}", f"peft d/{last}"),
        **{f"{base}_over_float32": ratio(f"switched {base} d/{first}", f"switched d/{first}") for base in bases},
    }


def main(config: Step) -> None:
    if config.quick:
        size = Size(width=64, layers=2, batch=2, length=64, heads=2)
        config = replace(config, size=size, repeats=5)
    console = start(config)
    timings = measure(config)
    rows = [
        [name, *(1e3 * value for value in timing[:3]), timing.median / timings["full"].median]
        for name, timing in timings.items()
    ]
    kind = "eager" if config.eager else "compiled"
    title = f"one {kind} step in ms, {config.dtype}, {config.size.tokens} tokens, width {config.size.width}"
    console.print(table(title, ["", "lower quartile", "median", "upper quartile", "over full"], rows))
    results = ratios(timings, config.fractions, config.bases)
    console.print(results)
    finish(config, results, {name: timing.all for name, timing in timings.items()})


if __name__ == "__main__":
    main(tyro.cli(Step))
