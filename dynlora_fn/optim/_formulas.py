"""The elementwise formulas by keys, which graphs contain instead of functions.

torch caches a graph only if it can import all its functions, and a formula is a function inside of another one.
"""

from collections.abc import Callable
from inspect import unwrap
from typing import Any, NamedTuple

_SIMPLE = (bool, int, float, complex, str, type(None))


class Formula(NamedTuple):
    """A formula and the settings of `elementwise`."""

    function: Callable[..., Any]
    results: int
    can_join: bool


FORMULAS: dict[str, Formula] = {}


def key_of(function: Callable[..., Any]) -> str:
    """Return the name of a function with the values that it captures.

    Functions with equal keys compute the same, so a cached graph of one is a graph of the other.

    Raises:
        TypeError: If the function captures an object that its `repr` does not describe.
    """
    function = unwrap(function)  # a decorator that checks shapes captures other objects
    captured = [_described(cell.cell_contents) for cell in function.__closure__ or ()]
    return f"{function.__module__}.{function.__qualname__}({', '.join(captured)})"


def _described(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_described, value))})"
    if hasattr(value, "__closure__"):
        return key_of(value)
    if not isinstance(value, _SIMPLE):
        raise TypeError(f"a formula captures a {type(value).__name__}; pass it in `settings`")
    return repr(value)
