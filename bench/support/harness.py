"""The options that all benchmarks share, their environment, and their output."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# OpenMP reads this when torch is loaded. A waiting OpenMP thread spins and takes the core from threads that have work.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Some virtual machines report AMX but forbid its use. The bfloat16 products of oneDNN then crash with an illegal
# instruction.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Options:
    """The options that every benchmark has."""

    quick: bool = False
    """Use small sizes and few repeats (under a minute). This only shows that the benchmark runs."""
    json: bool = False
    """Print one JSON object on the last line."""
    out: Path | None = None
    """Also write the object with all raw numbers to this file."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    threads: int = 2
    """Number of CPU threads."""


def environment(options: Options) -> dict[str, Any]:
    """Return the hardware, versions, commit and command of this run."""
    is_cuda = torch.device(options.device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if is_cuda else _processor(),
        "threads": options.threads,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "command": " ".join(["python -m", _program(), *_arguments()]),
        "load": os.getloadavg()[0],
    }


def _program() -> str:
    """Return the module name of the benchmark."""
    path = Path(sys.argv[0])
    return f"bench.{path.parent.name if path.stem == '__main__' else path.stem}"


def _arguments() -> list[str]:
    """Return the command line without `--out FILE`."""
    arguments = sys.argv[1:]
    at = arguments.index("--out") if "--out" in arguments else len(arguments)
    return arguments[:at] + arguments[at + 2 :]


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def start(options: Options) -> Console:
    """Set the number of threads, print the environment, and return a console.

    All output of the benchmark is printed to this console. With `json`, it is on stderr.
    """
    torch.set_num_threads(options.threads)
    console = Console(stderr=options.json, width=120)
    console.print(", ".join(f"{name} {value}" for name, value in environment(options).items()), highlight=False)
    return console


def table(title: str, columns: list[str], rows: list[list[Any]]) -> Table:
    """Build a table that shows floats with four significant digits.

    The first column is left-aligned, and the others are right-aligned.
    """
    result = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        result.add_column(column, justify="right" if index else "left")
    for row in rows:
        result.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    return result


def finish(options: Options, results: dict[str, Any], raw: Any) -> None:
    """Write the results and raw numbers to `options.out`, if it is given.

    With `json`, the results are also printed as one JSON object.
    """
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"environment": environment(options), **results, "raw": raw}
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    if options.json:
        print(json.dumps(results))


def run_in_subprocess(program: str, flags: Sequence[str], variables: Mapping[str, str]) -> Any:
    """Run ``python -m PROGRAM FLAGS`` and return the JSON of its last line.

    `variables` are added to the environment of the process.
    """
    command = [sys.executable, "-m", program, *flags]
    environ = {**os.environ, **variables}
    output = subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])
