"""Measure the contenders of a row.

Contenders take turns in one process for processor time. Each peak is measured in a separate process.
"""

import gc
import random
import time
from statistics import median
from typing import Any

from bench.growth.row import Contender, Curve, Row, result_of
from bench.support.process_memory import peak_bytes, reset_peak, resident_bytes

_CPU = "cpu"


def processor_seconds(contender: Contender) -> float:
    """Return the processor time of one run, in seconds.

    It is the sum over all threads of this process.
    """
    arguments = contender.before()
    gc.collect()
    start = time.process_time()
    result = contender.run(*arguments)
    elapsed = time.process_time() - start
    del result
    return elapsed


def seconds_of(row: Row, size: int, rounds: int, limit: float) -> dict[str, list[float]]:
    """Return the seconds of every run of every contender.

    In each round, every contender runs once, in another order: memory that one frees makes the next one faster, or
    slower if the system takes it back. No further round is started after `limit` seconds.
    """
    contenders = {name: make(size) for name, make in row.contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    start = time.perf_counter()
    for round_ in range(rounds):
        if round_ and time.perf_counter() - start > limit:
            break
        for name in random.Random(round_).sample(list(contenders), len(contenders)):
            times[name].append(processor_seconds(contenders[name]))
    return times


def peak_of(row: Row, name: str, size: int) -> dict[str, float]:
    """Return the peak of one run, and the memory that stays in use after it.

    Both are in bytes, beyond the memory in use before the run.
    """
    contender = row.contenders[name](size)
    arguments = contender.before()
    gc.collect()
    before = resident_bytes(_CPU)
    reset_peak(_CPU)
    result = contender.run(*arguments)
    peak = peak_bytes(_CPU)
    gc.collect()
    stays = resident_bytes(_CPU)
    del result
    return {name: peak - before, result_of(name): stays - before}


def warm_up(row: Row, names: Any) -> None:
    """Run contenders once at the smallest size."""
    for name in names:
        contender = row.contenders[name](row.quick[0])
        contender.run(*contender.before())


def medians(times: dict[int, dict[str, list[float]]]) -> dict[str, Curve]:
    """Return the curve of each contender, with the median at each size."""
    names = list(next(iter(times.values())))
    return {name: {size: median(of_size[name]) for size, of_size in times.items()} for name in names}
