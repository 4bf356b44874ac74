"""One command for each experiment: prints the plan and the time it needs, and goes on where it stopped."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import tyro
from rich.console import Console

import bench.common  # noqa: F401, settings that torch reads when it is loaded
from bench.quality import store
from bench.quality.dense_methods import FullRank, Packaged
from bench.quality.experiments import EXPERIMENTS
from bench.quality.job import Job
from bench.quality.low_rank import LowRankMethod
from bench.quality.runs import SIZES, Run
from bench.quality.sweeps import missing_of
from bench.quality.train import Method, train
from models import corpus as text

# A run's time where none of its size is known, in seconds: about what it takes on one core.
_GUESS = {"tiny": 1.0, "small": 12.0, "medium": 80.0, "large": 200.0}


@dataclass(frozen=True)
class Quality:
    experiment: tyro.conf.Positional[str]
    """methods, ranks, ablations or compensation."""
    sizes: tuple[str, ...] = ("small",)
    text: tuple[Path, ...] = ()
    """Files or folders to train on, instead of the standard library."""
    folder: Path = Path("bench/results/quality")
    """Where results are, and those of other experiments are found."""
    threads: int = 1
    plan: bool = False
    """Print the plan alone."""
    minutes: float = float("inf")
    """Stop after these; the same command goes on."""
    backend: str = "inductor"


def make(job: Job, run: Run) -> Method:
    if run.method == "full":
        return FullRank(job, run)
    return Packaged(job, run) if run.method in ("galore", "apollo") else LowRankMethod(job, run)


def main(config: Quality) -> None:
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    console = Console(width=120)
    config.folder.mkdir(parents=True, exist_ok=True)
    documents = text.split(text.text_files(config.text) if config.text else text.standard_library())
    corpus = text.tokenize(documents, text.byte_tokenizer(), window=max(SIZES[size].length for size in SIZES) + 1)
    digest, started = corpus.digest()[:12], time.perf_counter()
    for size in config.sizes:
        job = Job(SIZES[size], corpus, backend=config.backend)
        while True:
            found = store.read(config.folder, digest)
            missing = missing_of(EXPERIMENTS[config.experiment](found, size).values())
            if not missing:
                break
            _print_plan(console, missing, found, size)
            if config.plan:
                break
            for run in missing:
                if time.perf_counter() - started > 60 * config.minutes:
                    return
                result = store.append(config.folder / f"{config.experiment}.jsonl", run, train(job, run, make), digest)
                console.print(f"{run.described()}: {result['loss']}, {result['seconds']:.1f} s", highlight=False)


def _print_plan(console: Console, missing: Sequence[Run], found: store.Found, size: str) -> None:
    known = [line["seconds"] for run, line in found.items() if run.size == size]
    seconds = median(known) if known else _GUESS[size]
    minutes = len(missing) * seconds / 60
    console.print(
        f"{len(missing)} runs of {size} before the next choice, about {minutes:.0f} minutes:", highlight=False
    )
    for run in missing:
        console.print(f"  {run.described()}", highlight=False, soft_wrap=True)
