"""Train each method with `models.pretrain`, and compare the results.

Each method runs in a separate process, with the same options.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from models.pretrain.checks import check
from models.pretrain.config import Config
from models.pretrain.learning_rate import peak_lr
from models.pretrain.settings import parse as parse_options

METHODS = ("full", "lora", "relora", "switchlora")


class Options(NamedTuple):
    """The options of the program."""

    methods: list[str]
    processes: int
    out: Path
    json: bool
    of_training: list[str]  # the arguments for `models.pretrain`


class Result(NamedTuple):
    """The options and the summary of a run, and its peak of resident memory."""

    config: Config
    summary: dict[str, Any]
    peak_bytes: int  # the largest peak of a single process


def parse(arguments: Sequence[str]) -> Options:
    """Parse the arguments of the command line.

    Arguments that are not options of this program are passed on to `models.pretrain`.

    Raises:
        ValueError: If an option is invalid, or is one that this program sets.
    """
    parser = argparse.ArgumentParser(
        prog="python -m models.compare",
        description="Train several methods with the same settings, one after the other, and print their measurements "
        "side by side. All further options are passed on to models.pretrain for every method.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=["full", "switchlora"], help="the methods, in this order"
    )
    parser.add_argument("--processes", type=int, default=1, help="number of processes that torchrun starts")
    parser.add_argument("--out", type=Path, help="folder of the runs and of comparison.json (runs/DATE-TIME-compare)")
    parser.add_argument("--json", action="store_true", help="print the comparison as one JSON object on the last line")
    known, of_training = parser.parse_known_args(arguments)
    if any(flag.split("=")[0] == "--method" for flag in of_training):
        raise ValueError("`--method` is set by this program; use --methods")
    if known.processes < 1:
        raise ValueError(f"`processes` must be at least 1, got {known.processes}")
    if len({*known.methods}) < len(known.methods):
        raise ValueError(f"`methods` must differ, got {' '.join(known.methods)}")
    out = known.out or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-compare"
    return Options(known.methods, known.processes, out, known.json, of_training)


def compare(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison.

    The exit code of a run that fails becomes the exit code of this program.
    """
    options = parse(sys.argv[1:] if arguments is None else arguments)
    results = {method: train(config, options) for method, config in configs_of(options).items()}
    console = Console(markup=False, emoji=False)
    console.print(table(results))
    record = {method: {**result.summary, "peak_bytes": result.peak_bytes} for method, result in results.items()}
    (options.out / "comparison.json").write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"{options.out}: comparison.json, {', '.join(f'{method}/' for method in results)}", highlight=False)
    if options.json:
        print(json.dumps(record))


def configs_of(options: Options) -> dict[str, Config]:
    """Return the options of each run.

    All options are checked first, so that bad options of a later run end the program before the first run.

    Raises:
        ValueError: For the first invalid option.
    """
    configs = {}
    for method in options.methods:
        config = parse_options(Config, "python -m models.compare", [*options.of_training, "--method", method])
        if options.processes == 1:  # several processes check their options when they start
            check(config)
        configs[method] = config
    return configs


def train(config: Config, options: Options) -> Result:
    """Train one method in a process and return its results."""
    method = config.training.method
    folder = options.out / method
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={options.processes}"] if options.processes > 1 else []
    command = [sys.executable, *launcher, "-m", "models.pretrain", *options.of_training]
    process = subprocess.Popen([*command, "--method", method, "--out", str(folder)])
    code, usage = _wait(process)
    if code != 0:
        raise SystemExit(code)
    summary = json.loads((folder / "summary.json").read_text())
    return Result(config, summary, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def _wait(process: subprocess.Popen[bytes]) -> tuple[int, Any]:
    """Wait for a process, and return its exit code and resource usage.

    Ctrl-C is sent to both processes. This one keeps waiting until the other has ended.
    """
    is_interrupted = False
    while True:
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except KeyboardInterrupt:
            is_interrupted = True
            continue
        process.returncode = os.waitstatus_to_exitcode(status)
        return 130 if is_interrupted else process.returncode, usage


def table(results: dict[str, Result]) -> Table:
    """Return a table of all measurements with a column for each method."""
    table = Table("", *results, title=_title([result.summary for result in results.values()]))
    for column in table.columns[1:]:
        column.justify = "right"
    for label, cell in _ROWS.items():
        table.add_row(label, *(cell(result) for result in results.values()))
    return table


def _title(summaries: list[dict[str, Any]]) -> str:
    first, count = summaries[0], summaries[0]["processes"]
    return f"{first['model']}, {first['steps']} steps, {count} process{'es' * (count > 1)}, measured"


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.2f} MB"


def _bytes(*names: str) -> Callable[[Result], str]:
    return lambda result: _megabytes(sum(result.summary["bytes"][name] for name in names))


_WEIGHTS = ("base", "residual", "factors", "full_rank")
_ROWS: dict[str, Callable[[Result], str]] = {
    "optimizer of the matrices": lambda result: result.config.inner_optimizer(),
    "peak learning rate of the matrices": lambda result: f"{peak_lr(result.config):g}",
    "validation loss, nats per token": lambda result: f"{result.summary['validation_loss']:.4f}",
    "validation perplexity": lambda result: f"{result.summary['perplexity']:.3f}",
    "seconds": lambda result: f"{result.summary['seconds']:,.0f}",
    "tokens per second": lambda result: f"{result.summary['tokens_per_second'] or math.nan:,.0f}",
    "peak memory of a process": lambda result: _megabytes(result.peak_bytes),
    "weights": _bytes(*_WEIGHTS),
    "gradients": _bytes("gradients"),
    "optimizer state": _bytes("optimizer"),
    "weights, gradients and optimizer state": _bytes(*_WEIGHTS, "gradients", "optimizer", "candidates"),
    "trained parameters": lambda result: f"{result.summary['trainable']:,}",
    "reduced over processes in a step": lambda result: _megabytes(result.summary["reduced_bytes_per_step"]),
    "vectors switched": lambda result: f"{result.summary['switched']:,}",
}
