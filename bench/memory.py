"""How much memory does a step take at its peak, beyond the state?

The measured peak is compared with the prediction of `peak_memory`. ``gradients`` is the forward and backward pass.
``update`` is the switch and the optimizer, with gradients as inputs. Each case runs in a separate process. The peak is
the resident memory of the process (Linux) on a CPU, and the memory of the allocator on CUDA.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import tyro

import dynlora_fn as dl
from bench.support.harness import Options, finish, run_in_subprocess, start, table
from bench.support.process_memory import MB, RETURN_FREED_MEMORY, count_bytes, peak_bytes, reset_peak, resident_bytes
from bench.support.training_steps import LibraryStep, StepSize, full_step

KINDS = ("full", "static", "switching", "gradients", "update", "remat")


@dataclass(frozen=True)
class Memory(Options):
    widths: tuple[int, ...] = (256, 384, 512)
    layers: int = 8
    fraction: int = 4
    """Width over rank."""
    base: Literal["bfloat16", "int8", "float8", "nf4"] | None = None
    """Format of the bases. Default None means float32."""
    residual: Literal["int8", "bfloat16"] | None = "bfloat16"
    """Format of the residuals of bases in low precision."""
    kind: str | None = None
    """Measure only this kind at the first width, in this process, and print the bytes."""

    def size(self, width: int) -> StepSize:
        """Return the size of the measured step."""
        return StepSize(width=width, layers=self.layers, length=64 if self.quick else 256)

    def options(self) -> dict[str, Any]:
        """Return the options of `torch.compile`.

        With `quick`, there are none and nothing is compiled.
        """
        return {} if self.quick else {"mode": "default"}


class Contender(NamedTuple):
    """A function to measure, its predicted peak, and the state that it starts from."""

    run: Callable[[], Any]
    predict: Callable[[], int]
    state: Any = ()


def contender(config: Memory, size: StepSize) -> Contender:
    """Build the contender of `config.kind`."""
    if config.kind == "full":
        return Contender(full_step(size, config.device, **config.options()), lambda: 0)
    wrap = (lambda model: dl.remat(model, ["layers.*"])) if config.kind == "remat" else None
    storage = {"base": config.base, "residual": config.residual}
    step = LibraryStep(size, size.width // config.fraction, config.device, wrap=wrap, **storage, **config.options())
    if config.kind == "gradients":
        return gradients_contender(config, step)
    if config.kind == "update":
        return update_contender(config, step)
    plan = step.first_plan() if config.kind == "switching" else None
    arguments = (step.state, step.tokens, step.lr, plan)
    return Contender(lambda: step.run(plan), lambda: dl.peak_memory(step.pure_step, *arguments).step, step.state)


def gradients_contender(config: Memory, step: LibraryStep) -> Contender:
    """Build the contender of the forward and backward pass."""
    run, state = compiled(step.gradients, config, donate=False), step.state
    predict = lambda: dl.peak_memory(step.gradients, state, step.tokens).step  # noqa: E731
    return Contender(lambda: run(state, step.tokens), predict, state)


def update_contender(config: Memory, step: LibraryStep) -> Contender:
    """Build the contender of the switch and the optimizer, with gradients as inputs."""
    plan, grads = step.first_plan(), dl.partition(step.params).trainable
    run = compiled(step.update, config)

    def update() -> None:
        step.state, _ = run(step.state, grads, step.lr, plan)

    predict = lambda: dl.peak_memory(step.update, step.state, grads, step.lr, plan).step  # noqa: E731
    return Contender(update, predict, step.state)


def compiled(function: Callable, config: Memory, **options: Any) -> Callable:
    """Compile a function as a step.

    With `quick`, the function is returned unchanged.
    """
    return function if config.quick else dl.compile_step(function, **config.options(), **options)


def measure(config: Memory) -> dict[str, float]:
    """Return the measured and the predicted peak, and the size of the state, in bytes.

    Peaks are beyond the state.
    """
    run, predict, state = contender(config, config.size(config.widths[0]))
    state_bytes = count_bytes(state)
    for _ in range(3):
        run()
    before = resident_bytes(config.device)
    reset_peak(config.device)
    for _ in range(2):
        run()
    return {"measured": max(peak_bytes(config.device) - before, 1), "predicted": predict(), "state": state_bytes}


def measure_kind(config: Memory, width: int, kind: str) -> dict[str, float]:
    """Measure a kind in a separate process.

    With `quick`, it is measured in this process, except for full rank.
    """
    if config.quick and kind != "full":
        return measure(replace(config, kind=kind, widths=(width,)))
    flags = ["--quick"] if config.quick else []
    flags += ["--kind", kind, "--widths", str(width), "--layers", str(config.layers)]
    flags += ["--fraction", str(config.fraction), "--device", config.device, "--threads", str(config.threads)]
    flags += ["--base", str(config.base), "--residual", str(config.residual)]
    return dict(run_in_subprocess("bench.memory", flags, RETURN_FREED_MEMORY))


def largest_weight(config: Memory, width: int) -> int:
    """Return the bytes of the largest weight in float32."""
    model = config.size(width).config()
    return 4 * model.width * model.hidden


def main(config: Memory) -> None:
    if config.quick:
        config = replace(config, widths=(64,), layers=2)
    if config.kind:
        torch.set_num_threads(config.threads)
        print(json.dumps(measure(config)))
        return
    console = start(config)
    last = config.widths[-1]
    # At widths other than the last, only the prediction of a step is checked, with and without `remat`.
    cases = [(width, kind) for width in config.widths for kind in KINDS if width == last or kind in ("static", "remat")]
    raw = {(width, kind): measure_kind(config, width, kind) for width, kind in cases}
    rows = []
    for (width, kind), case in raw.items():
        ratio = case["predicted"] / case["measured"] if case["predicted"] else "-"
        rows.append([width, kind, case["measured"] / MB, case["predicted"] / MB or "-", ratio])
    columns = ["width", "step", "measured MB", "predicted MB", "predicted / measured"]
    base = f"{config.base}+{config.residual} bases" if config.base else "float32"
    console.print(table(f"peak beyond the state, {base}, {config.layers} layers", columns, rows))
    extra = raw[last, "switching"]["measured"] - raw[last, "gradients"]["measured"]
    results = {
        "extra_peak_over_weight": extra / largest_weight(config, last),
        "update_peak_over_weight": raw[last, "update"]["measured"] / largest_weight(config, last),
        "predicted_over_measured": {
            width: raw[width, "static"]["predicted"] / raw[width, "static"]["measured"] for width in config.widths
        },
        "remat_peak_ratio": raw[last, "remat"]["measured"] / raw[last, "static"]["measured"],
        "static_over_full": raw[last, "static"]["measured"] / raw[last, "full"]["measured"],
    }
    console.print(results)
    finish(config, results, {f"{width} {kind}": case for (width, kind), case in raw.items()})


if __name__ == "__main__":
    main(tyro.cli(Memory))
