"""Split lists into batches of limited size, which bounds temporary memory."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def batches(items: Iterable[Item], size: Callable[[Item], int], *, most: int) -> Iterator[list[Item]]:
    """Yield lists of consecutive items whose sizes sum to at most `most`.

    An item larger than `most` gets a list to itself.

    Args:
        items: The items, in the order of the result.
        size: A function that returns the size of an item.
        most: The largest sum of sizes in one list.

    Example:
        >>> list(batches([2, 3, 9, 1], lambda item: item, most=5))
        [[2, 3], [9], [1]]
    """
    batch: list[Item] = []
    total = 0
    for item in items:
        count = size(item)
        if batch and total + count > most:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += count
    if batch:
        yield batch
