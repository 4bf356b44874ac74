"""Share one plan between many weights, and cache what is computed from it."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from dynlora_fn._core._types import SidePlan

Result = TypeVar("Result")

_FEW = 12


def share_plans(count: int) -> bool:
    """Return whether `count` weights share plans and the results computed from plans.

    In eager mode they always do. In a compiled step of up to 12 weights or stacks, each weight gets separate
    operations, which the compiler fuses into their readers. More separate operations would take too long to trace.
    """
    return count > _FEW or not torch.compiler.is_compiling()


def remembered(function: Callable[..., Result]) -> Callable[..., Result]:
    """Return a function with a cache. Its arguments are plan sides and integers.

    Two sides are equal if they contain the same tensor objects as `slots` and `active`. The result must not depend on
    `indices`.
    """
    results: dict[Any, Result] = {}

    def find(*args: SidePlan | int) -> Result:
        key = tuple([(arg.slots, arg.active) if isinstance(arg, SidePlan) else arg for arg in args])
        if key not in results:
            results[key] = function(*args)
        return results[key]

    return find
