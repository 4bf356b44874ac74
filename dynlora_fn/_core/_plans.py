"""Compute once what many weights need from one plan."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from dynlora_fn._core._types import SidePlan

Result = TypeVar("Result")

_FEW = 12


def share_plans(count: int) -> bool:
    """Return whether so many weights share plans and what is computed from them.

    In a compiled step of few weights, as stacks are, each weight has separate operations, which a compiler fuses into
    those that read them. For many weights they would take long to trace.
    """
    return count > _FEW or not torch.compiler.is_compiling()


def remembered(function: Callable[..., Result]) -> Callable[..., Result]:
    """Return a function that computes each result once.

    Its arguments are sides of plans, and numbers. Sides are the same if their tensors are.
    """
    results: dict[Any, Result] = {}

    def find(*args: SidePlan | int) -> Result:
        key = tuple([(arg.slots, arg.active) if isinstance(arg, SidePlan) else arg for arg in args])
        if key not in results:
            results[key] = function(*args)
        return results[key]

    return find
