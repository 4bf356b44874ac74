"""How does compile time grow with depth, and how long does a compiled call take?

Each case runs in a separate process without any cache. A trivial function is compiled before, which loads the compiler.
A second start uses the caches that the first start has filled. In the case ``blocks``, each block of the model is
compiled by itself, and the step around them is eager.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
import tyro
from torch import nn

import dynlora_fn as dl
from bench.support.harness import Options, finish, run_in_subprocess, start, table
from bench.support.timing import interleave
from bench.support.training_steps import LibraryStep, StepSize, compile_blocks, loss_of


@dataclass(frozen=True)
class CompileTime(Options):
    width: int = 512
    fraction: int = 4
    """Width over rank."""
    shallow: int = 4
    """Number of layers of the shallow update that is compiled."""
    deep: int = 32
    """Number of layers of the deep update that is compiled."""
    layers: int = 8
    """Number of layers of the model in a whole training step."""
    deep_step: int | None = None
    """Also compile whole steps without a switch of a model with this many layers."""
    repeats: int = 2
    case: str | None = None
    """Compile only this case with `layers` layers, in this process, and print the seconds."""

    def size(self) -> StepSize:
        """Return the size of the measured step."""
        return StepSize(width=self.width, layers=self.layers, length=16 if self.quick else 256)

    def options(self) -> dict[str, Any]:
        """Return the options of `torch.compile`."""
        return {"backend": "eager"} if self.quick else {"mode": "default"}


def compiled(config: CompileTime) -> Callable[[], Any]:
    """Return a function whose first call compiles the case."""
    size, device = config.size(), config.device
    if config.case == "plain":
        model, tokens = size.model(device), size.tokens_on(device)
        forward = torch.compile(model, fullgraph=True, dynamic=False, **config.options())
        return lambda: loss_of(forward(tokens[:, :-1]), tokens).backward()
    if config.case == "blocks":
        wrap = partial(compile_blocks, **config.options())
        step = LibraryStep(size, size.width // config.fraction, device, wrap=wrap)
        return partial(step.run, step.first_plan())
    step = LibraryStep(size, size.width // config.fraction, device, **config.options())
    plan = step.first_plan()
    if config.case == "update":
        update, grads = dl.compile_step(step.update, **config.options()), dl.partition(step.params).trainable
        return lambda: update(step.state, grads, step.lr, plan)
    return {"static": step.run, "switching": lambda: step.run(plan)}[str(config.case)]


def measure(config: CompileTime) -> float:
    """Return the seconds of the first call minus the seconds of the second call."""
    torch.compile(lambda x: x + 1, **config.options())(torch.zeros(3, device=config.device))
    function = compiled(config)
    started = time.perf_counter()
    function()
    first = time.perf_counter() - started
    started = time.perf_counter()
    function()
    return first - (time.perf_counter() - started)


def measure_case(config: CompileTime, case: str, layers: int) -> float:
    """Measure a case in a separate process.

    With `quick`, it is measured in this process, which is faster.
    """
    if config.quick:
        return measure(replace(config, case=case, layers=layers))
    return _in_process(config, case, layers, {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"})


def measure_second_start(config: CompileTime, case: str, layers: int) -> float:
    """Measure a case in a process whose caches another process has filled."""
    with tempfile.TemporaryDirectory() as folder:
        return [_in_process(config, case, layers, {"TORCHINDUCTOR_CACHE_DIR": folder}) for _ in range(2)][-1]


def _in_process(config: CompileTime, case: str, layers: int, variables: dict[str, str]) -> float:
    flags = ["--case", case, "--layers", str(layers), "--width", str(config.width), "--fraction", str(config.fraction)]
    flags += ["--device", config.device, "--threads", str(config.threads)]
    return float(run_in_subprocess("bench.compile_time", flags, variables))


def call_overhead(config: CompileTime) -> float:
    """Return the seconds of one call of a step that does almost no work."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(config.device)
    params = dl.init(model, rank=2, seed=0, targets=["*.weight"])
    optimizer, x = dl.optim.adamw(), torch.randn(4, 8, device=config.device)
    trainable, frozen = dl.partition(params)
    state = trainable, frozen, optimizer.init(trainable)

    def step(state: Any, x: torch.Tensor, lr: torch.Tensor) -> tuple[Any, torch.Tensor]:
        trainable, frozen, opt_state = state
        loss, grads = dl.value_and_grad(lambda tree: dl.call(model, dl.combine(tree, frozen), x).square().mean())(
            trainable
        )
        updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=lr)
        return (dl.apply_updates(trainable, updates), frozen, opt_state), loss

    run, lr = dl.compile_step(step, **config.options()), torch.tensor(1e-3, device=config.device)
    return interleave({"call": lambda: run(state, x, lr)}, repeats=200, device=config.device)["call"].median


def main(config: CompileTime) -> None:
    if config.case:
        torch.set_num_threads(config.threads)
        print(measure(config))
        return
    if config.quick:
        config = replace(config, width=64, shallow=1, deep=2, layers=1, repeats=1)
    console = start(config)
    cases = [("update", config.shallow), ("update", config.deep), ("plain", config.layers)]
    cases += [] if config.quick else [("static", config.layers)]
    cases += [("switching", config.layers), ("blocks", config.layers)]
    cases += [(case, config.deep_step) for case in ("plain", "static", "blocks") if config.deep_step]
    times: dict[str, list[float]] = {f"{case} {layers}": [] for case, layers in cases}
    for _ in range(config.repeats):
        for case, layers in cases:
            times[f"{case} {layers}"].append(measure_case(config, case, layers))
        for case in () if config.quick else ("plain", "static", "switching", "blocks"):
            second = measure_second_start(config, case, config.layers)
            times.setdefault(f"{case} {config.layers}, second start", []).append(second)
    seconds = {name: median(values) for name, values in times.items()}
    rows = [[name, value, times[name]] for name, value in seconds.items()]
    console.print(table("seconds to compile", ["case, layers", "median", "all"], rows))
    plain, layers = seconds[f"plain {config.layers}"], config.layers
    results = {
        "compile_deep_over_shallow": seconds[f"update {config.deep}"] / seconds[f"update {config.shallow}"],
        "compile_switching_over_plain": seconds[f"switching {layers}"] / plain,
        "compile_static_over_plain": seconds.get(f"static {layers}", 0.0) / plain,
        "compile_blocks_over_plain": seconds[f"blocks {layers}"] / plain,
        "second_start_seconds": seconds.get(f"switching {layers}, second start", 0.0),
        "call_overhead_ms": 1e3 * call_overhead(config),
    }
    console.print(results)
    finish(config, results, times)


if __name__ == "__main__":
    main(tyro.cli(CompileTime))
