"""Report the progress of long work to the caller."""

from collections.abc import Callable
from typing import Any, TypeAlias

from dynlora_fn._core._check import described

Progress: TypeAlias = Callable[[int, int], object]


def check_progress(progress: Any) -> None:
    """Raise TypeError if `progress` is neither a function nor None."""
    if progress is not None and not callable(progress):
        raise TypeError(f"`progress` is {described(progress)}; pass a function of the bytes done and in total, or None")


def reporter(progress: Progress | None, total: int) -> Callable[[int], None]:
    """Return a function that counts the bytes done and reports them to `progress`.

    ``progress(0, total)`` is called at once, so that a bar can be shown before the first bytes are done.

    Args:
        progress: The caller's function ``progress(done, total)`` of the bytes done so far and the total bytes. An
            exception that it raises stops the work. None means no reports.
        total: The total number of bytes.

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
