"""What every benchmark shares: the environment it ran in, interleaved timing, and one object of results."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

# Read when torch is loaded. A thread of OpenMP that waits spins, and takes the core from whoever has work to do.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Some virtual machines report AMX and forbid it, and oneDNN's bfloat16 products then die of an illegal instruction.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import torch
from rich.console import Console
from rich.table import Table
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Common:
    quick: bool = False
    """Smaller sizes and few repeats, under a minute: whether it runs, not what it measures."""
    json: bool = False
    """One JSON object on the last line."""
    out: Path | None = None
    """Also write the object to this file, with all raw numbers."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    threads: int = 2
    """Of the CPU."""


class Timing(NamedTuple):
    """Seconds."""

    lower: float  # quartiles
    median: float
    upper: float
    all: list[float]

    @classmethod
    def of(cls, times: list[float]) -> "Timing":
        return cls(*quantiles(times, n=4, method="inclusive"), times)


def count_bytes(tree: Any) -> int:
    """Of the tensors in it, on the meta device too."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def interleave(contenders: Mapping[str, Callable[[], Any]], *, repeats: int, device: str) -> dict[str, Timing]:
    """Times of each, all taken in turn, so that what else the machine does falls on all of them alike. The first two
    rounds, in which things are compiled and caches filled, do not count."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(repeats + 2):
        for name, contender in contenders.items():
            elapsed = seconds(contender, device)
            if round_ >= 2:
                times[name].append(elapsed)
    return {name: Timing.of(values) for name, values in times.items()}


def environment(common: Common) -> dict[str, Any]:
    is_cuda = torch.device(common.device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if is_cuda else _processor(),
        "threads": common.threads,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "command": " ".join(["python -m", "bench." + Path(sys.argv[0]).stem, *_arguments()]),
        "load": os.getloadavg()[0],
    }


def _arguments() -> list[str]:
    """Those of the command line but for where the results go."""
    given = sys.argv[1:]
    at = given.index("--out") if "--out" in given else len(given)
    return given[:at] + given[at + 2 :]


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def start(common: Common) -> Console:
    """Sets the number of threads and prints the environment; returns where to print to."""
    torch.set_num_threads(common.threads)
    console = Console(stderr=common.json, width=120)
    console.print(", ".join(f"{name} {value}" for name, value in environment(common).items()), highlight=False)
    return console


def table(title: str, columns: list[str], rows: list[list[Any]]) -> Table:
    made = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left")
    for row in rows:
        made.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    return made


def finish(common: Common, results: dict[str, Any], raw: Any) -> None:
    if common.out:
        common.out.parent.mkdir(parents=True, exist_ok=True)
        common.out.write_text(json.dumps({"environment": environment(common), **results, "raw": raw}, indent=1) + "\n")
    if common.json:
        print(json.dumps(results))
