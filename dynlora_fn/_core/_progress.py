"""Report the progress of long work to the caller."""

from collections.abc import Callable
from typing import Any, TypeAlias

from dynlora_fn._core._check import described

Progress: TypeAlias = Callable[[int, int], object]


def check_progress(progress: Any) -> None:
    """Raise TypeError if a value is neither a function nor None."""
    if progress is not None and not callable(progress):
        raise TypeError(f"`progress` is {described(progress)}; pass a function of the bytes done and in total, or None")


def reporter(progress: Progress | None, total: int) -> Callable[[int], None]:
    """Return a function that adds bytes to those done, and reports them.

    ``progress(0, total)`` is called at once, so that a bar can be shown before the first bytes are done.

    Args:
        progress: The caller's function, which gets the bytes done so far and the bytes in total. None reports nothing.
            What it raises stops the work.
        total: The bytes in total.

    Example:
        >>> report = reporter(lambda done, total: print(f"{done} of {total}"), 12)
        0 of 12
        >>> report(8)
        8 of 12
        >>> report(4)
        12 of 12
    """
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    report(0)
    return report
