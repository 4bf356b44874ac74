"""How long do steps take on one GPU, and how much memory?

Whole steps with bfloat16 autocast are timed: full rank, PEFT's LoRA, and this library. The peak of the allocator is
compared with `peak_memory`. The `gpu` tests run too. All this takes under ten minutes on an H100. At the end, the parts
that failed are printed with their errors.

Each part runs in a separate process. The parts of a width compile at the same time, and then measure one after the
other.
"""

import faulthandler
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from tempfile import TemporaryFile
from typing import IO, Any, Literal, NamedTuple

import torch
import tyro

import dynlora_fn as dl
from bench import memory
from bench.quality.job import is_inner
from bench.step_by_method import make_packaged, muon
from bench.support.harness import ROOT, Options, finish, start, table
from bench.support.process_memory import MB
from bench.support.timing import Timing, interleave
from bench.support.training_steps import LibraryStep, StepSize, full_step, peft_step

_DTYPE = torch.bfloat16  # dtype of the products, by autocast
_FRACTION = 4  # width over rank
_MEMORY_KINDS = ("static", "switching", "remat")
_READY = "ready"  # the line that a part prints when everything is compiled


@dataclass(frozen=True)
class Gpu(Options):
    widths: tuple[int, ...] = (1024, 2048)
    layers: int = 4
    batch: int = 8
    length: int = 1024
    vocabulary: int = 32_000
    repeats: int = 20
    products: Literal["highest", "high", "medium"] = "high"
    """Precision of float32 products, as in `torch.set_float32_matmul_precision`.

    Autocast does not apply to the products that form a weight from its base and factors, nor to the gradients of
    factors.
    """
    part: str | None = None
    """Measure only this part, in this process, and print it. It starts to measure after a line on standard input."""
    limit: float = 540
    """Seconds after which a part ends with an error."""

    def size(self, width: int) -> StepSize:
        """Return the size of the measured steps."""
        return StepSize(width, self.layers, self.batch, self.length, self.vocabulary, heads=max(width // 64, 1))

    def options(self, **compile_options: Any) -> dict[str, Any]:
        """Return the options of `torch.compile`.

        With `quick`, there are none and nothing is compiled.
        """
        return {} if self.quick else {"mode": "default", **compile_options}


Contenders = dict[str, Callable[[], Any]]


def baselines(config: Gpu, width: int) -> Contenders:
    """Return the steps of full rank and of PEFT."""
    size, device, options = config.size(width), config.device, config.options()
    of_inner, of_torch = muon(lambda name, _: is_inner(name)), make_packaged("torch_muon")
    full_muon = LibraryStep(size, width // _FRACTION, device, _DTYPE, targets=(), optimizer=of_inner, **options)
    return {
        "full rank, AdamW (fused)": full_step(size, device, _DTYPE, **options),
        "full rank, torch.optim.Muon": full_step(size, device, _DTYPE, make_optimizer=of_torch, **options),
        "full rank, dl.optim.muon": full_muon.run,
        "PEFT, AdamW (fused)": peft_step(size, width // _FRACTION, device, _DTYPE, **options),
    }


def library(config: Gpu, width: int, **settings: Any) -> LibraryStep:
    """Return a step of this library."""
    options = config.options(**settings.pop("compile_options", {}))
    return LibraryStep(config.size(width), width // _FRACTION, config.device, _DTYPE, **settings, **options)


def switching(step: LibraryStep, name: str) -> Contenders:
    """Return a step with and without a switch."""
    plan = step.first_plan()
    return {name: step.run, f"{name}, switching": lambda: step.run(plan)}


def factor_muon() -> dl.optim.Transform:
    """Return Muon for factors, and AdamW for other parameters."""
    return muon(lambda _, leaf: not isinstance(leaf, torch.Tensor))


def low_precision(config: Gpu, width: int) -> Contenders:
    """Return steps on bases in low precision."""
    bases = {"int8": "bfloat16", "float8": "bfloat16", "nvfp4": "bfloat16"}
    return {f"ours, {base}+{residual}": library(config, width, base=base, residual=residual).run
            for base, residual in bases.items()}  # fmt: skip


def offloaded(config: Gpu, width: int) -> Contenders:
    """Return a step whose residuals are in host memory."""
    step = library(config, width, base="int8", residual="bfloat16", residual_device="cpu")
    return switching(step, "ours, int8, residual on the host")


def graphs(config: Gpu, width: int) -> Contenders:
    """Return a step that replays CUDA graphs over donated state."""
    return {"ours, reduce-overhead": library(config, width, compile_options={"mode": "reduce-overhead"}).run}


STEPS: dict[str, Callable[[Gpu, int], Contenders]] = {
    "baselines": baselines,
    "adamw": lambda config, width: switching(library(config, width), "ours, AdamW"),
    "muon": lambda config, width: switching(library(config, width, optimizer=factor_muon()), "ours, Muon"),
    "low precision": low_precision,
    "offloaded": offloaded,
    "graphs": graphs,
}
AT_ALL_WIDTHS = ("baselines", "adamw", "muon")


def measure(config: Gpu, part: str) -> dict[str, Any]:
    """Measure a part in this process.

    Results are the seconds of all repeats of each contender, or bytes, or the outcome of the tests.
    """
    if part == "tests":
        return run_tests(config)
    name, width = part.rsplit(" ", 1)
    if name == "memory":
        return measure_memory(config, int(width))
    contenders, when_warm = STEPS[name](config, int(width)), wait_for_turn if config.part else lambda: None
    timings = interleave(contenders, repeats=config.repeats, device=config.device, when_warm=when_warm)
    return {contender: timing.all for contender, timing in timings.items()}


def measure_memory(config: Gpu, width: int) -> dict[str, dict[str, float]]:
    """Return the measured and predicted bytes of each kind of step."""
    shared = {"quick": config.quick, "device": config.device, "threads": config.threads, "layers": config.layers}
    kinds = {kind: memory.Memory(widths=(width,), fraction=_FRACTION, kind=kind, **shared) for kind in _MEMORY_KINDS}
    return {kind: memory.measure(settings) for kind, settings in kinds.items()}


def run_tests(config: Gpu) -> dict[str, str]:
    """Run the `gpu` tests, and return pytest's last line and the failed tests.

    With `quick`, the tests are only collected.
    """
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", "tests/system/test_gpu.py"]
    command += ["--collect-only"] if config.quick else []
    environ = {**os.environ, "COLUMNS": "400"}  # otherwise pytest shortens errors
    output = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False).stdout
    failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return {"outcome": output.strip().splitlines()[-1], "failed": "; ".join(failed)}


def wait_for_turn() -> None:
    """Print that everything is compiled, and wait until this part may measure.

    The main process then writes a line to standard input.
    """
    print(_READY, flush=True)
    sys.stdin.readline()


def parts(config: Gpu) -> list[list[str]]:
    """Return groups of the names of parts, one group for each width.

    The parts of a group are in the memory of the GPU at the same time.
    """
    first, *others = config.widths
    of_first = ["tests", *[f"{name} {first}" for name in STEPS], f"memory {first}"]
    return [of_first, *[[f"{name} {width}" for name in AT_ALL_WIDTHS] for width in others]]


class Process(NamedTuple):
    """The process of a part, and the file that its errors go to."""

    process: subprocess.Popen[str]
    errors: IO[str]

    @classmethod
    def start(cls, part: str) -> "Process":
        """Start the process, which compiles at once."""
        command = [sys.executable, "-m", "bench.gpu", *sys.argv[1:], "--part", part]
        pipe, errors = subprocess.PIPE, TemporaryFile("w+")  # noqa: SIM115 (open while the process runs)
        return cls(subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=errors, text=True), errors)

    def until_ready(self) -> str:
        """Wait until the part has compiled everything or has ended.

        Return the line that it printed.
        """
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def result(self, line: str) -> Any:
        """Let the part measure and return what it prints, or its error."""
        output, _ = self.process.communicate("\n")
        self.errors.seek(0)
        errors = self.errors.read().strip().splitlines()
        if self.process.returncode:
            return {"error": errors[-1] if errors else f"exit code {self.process.returncode}"}
        return json.loads((line + output).strip().splitlines()[-1])


def results_of(config: Gpu, group: list[str]) -> dict[str, Any]:
    """Return the results of a group.

    After all parts have compiled, they measure one after the other. With `quick`, this process measures them.
    """
    if config.quick:
        return {part: measure(config, part) for part in group}
    processes = {part: Process.start(part) for part in group}
    lines = {part: process.until_ready() for part, process in processes.items()}
    return {part: process.result(lines[part]) for part, process in processes.items()}


def step_rows(results: dict[str, Any], width: int) -> dict[str, Timing]:
    """Return the timings of all contenders at a width."""
    seconds = {name: values for part in STEPS for name, values in results.get(f"{part} {width}", {}).items()}
    return {name: Timing.of(values) for name, values in seconds.items() if name != "error"}


def report(config: Gpu, results: dict[str, Any]) -> dict[str, float]:
    """Print the tables, and return the ratio of each contender to full rank."""
    console, ratios = start(config), {}
    for width in config.widths:
        timings = step_rows(results, width)
        full = timings.get("full rank, AdamW (fused)")
        over = {name: timing.median / full.median if full else float("nan") for name, timing in timings.items()}
        rows = [[name, *(1e3 * value for value in timing[:3]), over[name]] for name, timing in timings.items()]
        tokens = config.size(width).tokens
        title = f"one step in ms, width {width}, {config.layers} layers, {tokens} tokens, rank {width // _FRACTION}"
        console.print(table(title, ["", "lower quartile", "median", "upper quartile", "over full"], rows))
        ratios |= {f"{name} at {width}": ratio for name, ratio in over.items()}
    kinds = results[f"memory {config.widths[0]}"]
    rows = [[kind, case["measured"] / MB, case["predicted"] / MB, case["predicted"] / case["measured"]]
            for kind, case in kinds.items() if kind != "error"]  # fmt: skip
    title = f"peak beyond the state in MB, float32, width {config.widths[0]}"
    console.print(table(title, ["", "measured", "predicted", "predicted / measured"], rows))
    console.print("tests:", results["tests"])
    console.print("failed:", {part: result["error"] for part, result in results.items() if "error" in result})
    return ratios


def main(config: Gpu) -> None:
    if config.quick:
        sizes = {"widths": (64,), "layers": 2, "batch": 2, "length": 64, "vocabulary": 256, "repeats": 3}
        config = replace(config, **sizes)
    if config.part:
        faulthandler.dump_traceback_later(config.limit, exit=True)
        torch.set_num_threads(config.threads)
        torch.set_float32_matmul_precision(config.products)
        print(json.dumps(measure(config, config.part)))
        return
    results = {part: result for group in parts(config) for part, result in results_of(config, group).items()}
    finish(config, report(config, results), results)


if __name__ == "__main__":
    main(tyro.cli(Gpu))
