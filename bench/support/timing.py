"""Time functions in turn, so that noise of the machine affects all equally."""

import random
import time
from collections.abc import Callable, Mapping
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch

_WARMUP_ROUNDS = 2  # rounds in which functions are compiled and caches are filled
_RESAMPLES = 2_000


class Timing(NamedTuple):
    """Quartiles of measured times, in seconds."""

    lower: float
    median: float
    upper: float
    all: list[float]

    @classmethod
    def of(cls, times: list[float]) -> "Timing":
        """Return the quartiles of `times`."""
        return cls(*quantiles(times, n=4, method="inclusive"), times)


class Ratio(NamedTuple):
    """A ratio of medians with its 95 % confidence interval."""

    lower: float
    value: float
    upper: float

    @classmethod
    def of(cls, timing: Timing, other: Timing) -> "Ratio":
        """Return the ratio of two functions that were timed in the same rounds.

        The interval is the percentile bootstrap over rounds: a resample takes both times of a round.
        """
        pairs = list(zip(timing.all, other.all, strict=True))
        draw = random.Random(0)
        ratios = sorted(_ratio_of_medians(draw.choices(pairs, k=len(pairs))) for _ in range(_RESAMPLES))
        tail = _RESAMPLES // 40
        return cls(ratios[tail], _ratio_of_medians(pairs), ratios[-1 - tail])


def values(ratios: Mapping[str, Ratio]) -> dict[str, float]:
    """Return the ratios of medians."""
    return {name: ratio.value for name, ratio in ratios.items()}


def intervals(ratios: Mapping[str, Ratio]) -> dict[str, list[float]]:
    """Return the ends of the confidence intervals."""
    return {name: [ratio.lower, ratio.upper] for name, ratio in ratios.items()}


def _ratio_of_medians(pairs: list[tuple[float, float]]) -> float:
    times, others = zip(*pairs, strict=True)
    return median(times) / median(others)


def synchronize(device: str) -> None:
    """Wait until the device has finished its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any], device: str) -> float:
    """Return the seconds that one call takes."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def interleave(
    contenders: Mapping[str, Callable[[], Any]],
    *,
    repeats: int,
    device: str,
    when_warm: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time every contender once in each of `repeats` rounds.

    Two rounds of warm-up and a call of `when_warm` come first.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(repeats + _WARMUP_ROUNDS):
        if round_ == _WARMUP_ROUNDS:
            when_warm()
        for name, contender in contenders.items():
            elapsed = seconds(contender, device)
            if round_ >= _WARMUP_ROUNDS:
                times[name].append(elapsed)
    return {name: Timing.of(values) for name, values in times.items()}


def weighted(common: Timing, occasional: Timing, fraction: float) -> Timing:
    """Return the average timing of two kinds of steps.

    A fraction `fraction` of the steps takes `occasional`, and the other steps take `common`.
    """
    pairs = zip(common.all, occasional.all, strict=True)
    return Timing.of([(1 - fraction) * usual + fraction * rare for usual, rare in pairs])
