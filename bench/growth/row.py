"""A row of the benchmark: contenders with the same work, and their goals.

The work is measured at several sizes.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import linear_regression
from typing import Any, Literal, NamedTuple

Curve = Mapping[int, float]  # the value at each size
Curves = Mapping[str, Curve]  # the curve of each contender
_SMALLEST = 1e-9  # used in place of zero, which has no logarithm


class Contender(NamedTuple):
    """A function to measure at one size."""

    run: Callable[..., Any]
    before: Callable[[], tuple[Any, ...]] = tuple  # builds the arguments of each run, which is not measured


class Goal(NamedTuple):
    """A limit of a value that is computed from the curves of a row."""

    text: str
    most: float
    value: Callable[[Curves], float]


@dataclass(frozen=True)
class Row:
    """A measurement of several contenders at several sizes.

    There are three kinds of measurements.

    - "seconds" is the processor time.
    - "peak" is the peak of memory in bytes, beyond the memory in use before. The curve ``result of NAME`` has the bytes
      that stay in use afterwards.
    - "value" is the number that a contender returns.
    """

    title: str
    size: str
    """The unit of the sizes."""
    sizes: tuple[int, ...]
    quick: tuple[int, ...]
    contenders: Mapping[str, Callable[[int], Contender]]
    kind: Literal["seconds", "peak", "value"] = "seconds"
    goals: tuple[Goal, ...] = ()
    rounds: int = 5


def exponent(curve: Curve) -> float:
    """Return the exponent of the growth of a curve.

    It is the slope of the least-squares line through the logarithms of sizes and values.
    """
    points = [(math.log(size), math.log(max(value, _SMALLEST))) for size, value in curve.items()]
    return linear_regression(*zip(*points, strict=True)).slope


def result_of(contender: str) -> str:
    """Return the name of the curve of the bytes that stay in use after a contender."""
    return f"result of {contender}"


def at_most_times(most: float, ours: str, peer: str) -> Goal:
    """Return the goal that `ours` is at most `most` times `peer` at every size."""

    def value(curves: Curves) -> float:
        return max(curves[ours][n] / max(curves[peer][n], _SMALLEST) for n in curves[ours])

    return Goal(f"{ours} over {peer}", most, value)


def grows_at_most(most: float, name: str) -> Goal:
    """Return the goal that a curve grows with at most this exponent."""
    return Goal(f"exponent of {name}", most, lambda curves: exponent(curves[name]))


def at_most(most: float, name: str) -> Goal:
    """Return the goal that the value at the largest size is at most `most`."""
    return Goal(f"{name} at the largest size", most, lambda curves: curves[name][max(curves[name])])


def needs_at_most(most: float, name: str, unit: Callable[[int], float], allowed: Callable[[int], float]) -> Goal:
    """Return the goal that a peak needs little memory beyond its result at every size.

    It may exceed the sum of the bytes that stay in use and of `allowed` by at most `most` units.
    """

    def value(curves: Curves) -> float:
        peak, result = curves[name], curves[result_of(name)]
        return max((peak[n] - result[n] - allowed(n)) / unit(n) for n in peak)

    return Goal(f"{name}, peak beyond result and largest tensor, over model or state", most, value)
