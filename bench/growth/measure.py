"""Measure the contenders of a row.

Seconds of the processor are in turns, and peaks are each in a separate process.
"""

import gc
import time
from statistics import median
from typing import Any

from bench.growth.row import Contender, Curve, Row, result_of
from bench.support.process_memory import peak_bytes, reset_peak, resident_bytes

_CPU = "cpu"


def processor_seconds(contender: Contender) -> float:
    """Return the seconds of the processor that one run takes, in all threads.

    The threads are those of this process.
    """
    arguments = contender.before()
    gc.collect()
    start = time.process_time()
    result = contender.run(*arguments)
    elapsed = time.process_time() - start
    del result
    return elapsed


def seconds_of(row: Row, size: int, rounds: int, limit: float) -> dict[str, list[float]]:
    """Return the seconds of each run of each contender, which take turns.

    After `limit` seconds no further round is started.
    """
    contenders = {name: make(size) for name, make in row.contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    start = time.perf_counter()
    for round_ in range(rounds):
        if round_ and time.perf_counter() - start > limit:
            break
        for name, contender in contenders.items():
            times[name].append(processor_seconds(contender))
    return times


def peak_of(row: Row, name: str, size: int) -> dict[str, float]:
    """Return the peak of one run and what stays in use after it.

    Both are beyond what was in use before.
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
    """Return the curve of each contender: the median at each size."""
    names = list(next(iter(times.values())))
    return {name: {size: median(of_size[name]) for size, of_size in times.items()} for name in names}
