"""How much memory does a step take at its peak, beyond the state? Each in a process of its own, against `explain`.

``gradients`` is the forward and backward pass alone, ``update`` the switch and the optimizer alone, given gradients.
On a CPU the peak is the process's resident memory (Linux), on CUDA the allocator's.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from torch.utils._pytree import tree_leaves

import dynlora_fn as dl
from bench.common import Common, finish, start, synchronize, table
from bench.training import Ours, Size, full_step

KINDS = ("full", "static", "switching", "gradients", "update", "remat")
MB = 1e6


@dataclass(frozen=True)
class Memory(Common):
    widths: tuple[int, ...] = (256, 384, 512)
    layers: int = 8
    fraction: int = 4
    """Width over rank."""
    base: Literal["bfloat16", "int8", "float8", "nf4"] | None = None
    """Of the low-rank weights; float32 unless given."""
    residual: Literal["int8", "bfloat16"] | None = "bfloat16"
    """Of such a base."""
    kind: str | None = None
    """Measure this one in this process, for the first of the widths, and print three numbers."""

    def size(self, width: int) -> Size:
        return Size(width=width, layers=self.layers, length=64 if self.quick else 256)

    def options(self) -> dict[str, Any]:
        """Of `torch.compile`; none, and nothing is compiled, where it is only to be seen that it runs."""
        return {} if self.quick else {"mode": "default"}


class Contender(NamedTuple):
    run: Callable[[], Any]
    predict: Callable[[], int]
    state: Any = ()


def contender(config: Memory, size: Size) -> Contender:
    """What is measured, what is predicted of it, and the state that it goes on from."""
    if config.kind == "full":
        return Contender(full_step(size, config.device, **config.options()), lambda: 0)
    wrap = (lambda model: dl.remat(model, ["layers.*"])) if config.kind == "remat" else None
    kept = {"base": config.base, "residual": config.residual}
    ours = Ours(size, size.width // config.fraction, config.device, wrap=wrap, **kept, **config.options())
    if config.kind == "gradients":
        run, state = compiled(ours.gradients, config, donate=False), ours.state
        predict = lambda: dl.peak_memory(ours.gradients, state, ours.tokens).step  # noqa: E731
        return Contender(lambda: run(state, ours.tokens), predict, state)
    if config.kind == "update":
        plan, grads = ours.plan_at(int(ours.schedule.interval)), dl.partition(ours.params).trainable
        run = compiled(ours.update, config)

        def update() -> None:
            ours.state, _ = run(ours.state, grads, ours.lr, plan)

        predict = lambda: dl.peak_memory(ours.update, ours.state, grads, ours.lr, plan).step  # noqa: E731
        return Contender(update, predict, ours.state)
    plan = ours.plan_at(int(ours.schedule.interval)) if config.kind == "switching" else None
    arguments = (ours.state, ours.tokens, ours.lr, plan)
    return Contender(lambda: ours.run(plan), lambda: dl.peak_memory(ours.pure_step, *arguments).step, ours.state)


def compiled(function: Callable, config: Memory, **options: Any) -> Callable:
    return function if config.quick else dl.compile_step(function, **config.options(), **options)


def measure(config: Memory) -> dict[str, float]:
    run, predict, state = contender(config, config.size(config.widths[0]))
    held = sum(leaf.nbytes for leaf in tree_leaves(state))
    for _ in range(3):
        run()
    before = resident(config.device)
    reset_peak(config.device)
    for _ in range(2):
        run()
    return {"measured": max(peak(config.device) - before, 1), "predicted": predict(), "state": held}


def resident(device: str) -> int:
    synchronize(device)
    return torch.cuda.memory_allocated() if device.startswith("cuda") else _status("VmRSS")


def peak(device: str) -> int:
    synchronize(device)
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else _status("VmHWM")


def reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def in_a_process_of_its_own(config: Memory, width: int, kind: str) -> dict[str, float]:
    """Where it is only to be seen that it runs, full rank alone has one."""
    if config.quick and kind != "full":
        return measure(replace(config, kind=kind, widths=(width,)))
    flags = ["--quick"] if config.quick else []
    flags += ["--kind", kind, "--widths", str(width), "--layers", str(config.layers)]
    flags += ["--fraction", str(config.fraction), "--device", config.device, "--threads", str(config.threads)]
    flags += ["--base", str(config.base), "--residual", str(config.residual)]
    # What is freed goes back to the system at once, or resident memory would not tell what is in use.
    own = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "bench.memory", *flags]
    output = subprocess.run(command, env=own, check=True, capture_output=True, text=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def largest_weight(config: Memory, width: int) -> int:
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
    # The widths before the last are there for what is predicted of a step, with and without `remat`.
    cases = [(width, kind) for width in config.widths for kind in KINDS if width == last or kind in ("static", "remat")]
    found = {(width, kind): in_a_process_of_its_own(config, width, kind) for width, kind in cases}
    rows = []
    for (width, kind), one in found.items():
        ratio = one["predicted"] / one["measured"] if one["predicted"] else "-"
        rows.append([width, kind, one["measured"] / MB, one["predicted"] / MB or "-", ratio])
    columns = ["width", "step", "measured MB", "predicted MB", "predicted / measured"]
    base = f"{config.base}+{config.residual} bases" if config.base else "float32"
    console.print(table(f"peak beyond the state, {base}, {config.layers} layers", columns, rows))
    extra = found[last, "switching"]["measured"] - found[last, "gradients"]["measured"]
    results = {
        "extra_peak_over_weight": extra / largest_weight(config, last),
        "update_peak_over_weight": found[last, "update"]["measured"] / largest_weight(config, last),
        "predicted_over_measured": {
            width: found[width, "static"]["predicted"] / found[width, "static"]["measured"] for width in config.widths
        },
        "remat_peak_ratio": found[last, "remat"]["measured"] / found[last, "static"]["measured"],
        "static_over_full": found[last, "static"]["measured"] / found[last, "full"]["measured"],
    }
    console.print(results)
    finish(config, results, {f"{width} {kind}": one for (width, kind), one in found.items()})


if __name__ == "__main__":
    main(tyro.cli(Memory))
