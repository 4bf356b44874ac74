"""Run an experiment: execute the missing runs, and write tables and plots.

The missing runs and their estimated time are printed first.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import torch
import tyro
from rich.console import Console

import bench.support.harness  # noqa: F401, sets environment variables that torch reads
from bench.quality import store
from bench.quality.dense_methods import FullRank, Packaged
from bench.quality.execute import Method, execute
from bench.quality.experiments import EXPERIMENTS as COMPARISONS
from bench.quality.frontier import frontier, recorded, write_frontier
from bench.quality.job import Job
from bench.quality.low_rank import LowRankMethod
from bench.quality.muon_ablations import muon_ablations
from bench.quality.runs import PACKAGED, SIZES, Run
from bench.quality.spectron import Spectron
from bench.quality.sweeps import missing_of
from bench.quality.tables import write_report
from models import corpus as text

EXPERIMENTS = {**COMPARISONS, "muon_ablations": muon_ablations, "frontier": frontier, "recorded": recorded}
# Estimated seconds of a run on one core, for the plan when no run of a size is recorded.
_GUESS = {"tiny": 1.0, "small": 12.0, "medium": 80.0, "main": 120.0, "large": 200.0, "huge": 700.0}


@dataclass(frozen=True)
class Quality:
    experiment: tyro.conf.Positional[
        Literal[
            "methods",
            "ranks",
            "test",
            "ablations",
            "compensation",
            "one_side",
            "muon_ablations",
            "frontier",
            "recorded",
        ]
    ]
    sizes: tuple[Literal["tiny", "small", "medium", "main", "large", "huge"], ...] = ("small",)
    rows: tuple[str, ...] = ()
    """Rows of the table to run. Default () means all rows."""
    text: tuple[Path, ...] = ()
    """Files or folders to train on. Default () means the sources of the standard library."""
    folder: Path = Path("bench/results/quality")
    """Folder of the results. Runs of other experiments in this folder are used too."""
    threads: int = 1
    plan: bool = False
    """Only print the plan, and write the report of the runs so far."""
    minutes: float = float("inf")
    """Stop after this time. The same command then continues."""
    backend: str = "inductor"
    """Backend of `torch.compile`."""
    device: str = "cpu"


def make_method(job: Job, run: Run) -> Method:
    """Build the method of a run in its initial state."""
    if run.method == "full":
        return FullRank(job, run)
    if run.method == "spectron":
        return Spectron(job, run)
    return Packaged(job, run) if run.method in PACKAGED else LowRankMethod(job, run)


def main(config: Quality) -> None:
    torch.set_num_threads(config.threads)
    console = Console(width=120)
    config.folder.mkdir(parents=True, exist_ok=True)
    documents = text.split(text.text_files(config.text) if config.text else text.standard_library())
    corpus = text.tokenize(documents, text.byte_tokenizer(), window=max(size.length for size in SIZES.values()) + 1)
    until = time.perf_counter() + 60 * config.minutes
    for size in config.sizes:
        job = Job(SIZES[size], corpus, backend=config.backend, device=config.device)
        while missing := _missing(config, corpus, size, console):
            if config.plan:
                break
            for run in missing:
                if time.perf_counter() > until:
                    _report(config, corpus)
                    return
                result = execute(job, run, make_method)
                path = config.folder / f"{config.experiment}.jsonl"
                store.append(path, run, result, digest_of(corpus))
                console.print(f"{run.described()}: {result['loss']}, {result['seconds']:.1f} s", highlight=False)
    _report(config, corpus)


def digest_of(corpus: text.Corpus) -> str:
    """Return the name of the corpus in recorded runs."""
    return corpus.digest()[:12]


def _missing(config: Quality, corpus: text.Corpus, size: str, console: Console) -> list[Run]:
    """Return the missing runs that must be executed next, and print them.

    Further runs may be chosen after them, from their results.
    """
    found = store.read(config.folder, digest_of(corpus))
    rows = EXPERIMENTS[config.experiment](found, size)
    if unknown := set(config.rows) - set(rows):
        raise SystemExit(f"unknown rows {', '.join(unknown)}; use some of {', '.join(rows)}")
    missing = missing_of(stage for name, stage in rows.items() if not config.rows or name in config.rows)
    if missing:
        _print_plan(console, missing, found, size)
    return missing


def _report(config: Quality, corpus: text.Corpus) -> None:
    found = store.read(config.folder, digest_of(corpus))
    is_recorded = config.experiment == "recorded"  # from the runs of all experiments
    started = set(config.sizes) if is_recorded else store.sizes_in(config.folder / f"{config.experiment}.jsonl")
    rows = {size: EXPERIMENTS[config.experiment](found, size) for size in SIZES if size in started}
    if config.experiment in ("frontier", "recorded"):
        write_frontier(config.folder, config.experiment, found, rows)
    else:
        write_report(config.folder, config.experiment, found, rows)


def _print_plan(console: Console, missing: Sequence[Run], found: store.Found, size: str) -> None:
    recorded = [line["seconds"] for run, line in found.items() if run.size == size]
    seconds = median(recorded) if recorded else _GUESS[size]
    minutes = len(missing) * seconds / 60
    console.print(
        f"{len(missing)} runs at size {size} before the next choice, about {minutes:.0f} minutes:", highlight=False
    )
    for run in missing:
        console.print(f"  {run.described()}", highlight=False, soft_wrap=True)
