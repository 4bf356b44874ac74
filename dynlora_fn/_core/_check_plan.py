"""Check the types, shapes and dtypes of plans, and their slots where possible.

Slots are checked only if they are on the CPU, since reading them from another device would wait for it.
"""

from typing import Any

import torch
from torch import Tensor

from dynlora_fn._core._check import check_by_name, described
from dynlora_fn._core._torch import can_read
from dynlora_fn._core._types import LowRank, Plan, SidePlan

_DTYPES = {"slots": torch.int64, "indices": torch.int64, "active": torch.bool}


def check_plan(argument: str, name: str, plan: Any, param: LowRank | None = None) -> None:
    """Raise if a value is not a plan, or does not fit the weight.

    Args:
        argument: The name of the argument, for the error message.
        name: The name of the weight, for the error message.
        plan: The plan.
        param: The weight. Default None checks the plan without a weight.

    Raises:
        TypeError: If a type or dtype is wrong.
        ValueError: If a shape or device does not fit, or a slot is not below the rank.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"`{argument}` has {described(plan)} for {name!r}; pass a Plan")
    if torch.compiler.is_dynamo_compiling():
        return  # tracing a check takes as long as tracing an operation
    for side_name, side in (("b", plan.b), ("a", plan.a)):
        where = f"`{argument}` has for side {side_name} of {name!r}"
        _check_side(where, side)
        if param is not None:
            _check_device(where, "slots", side.slots, param.factors.a.device)
    frozen_for, where = plan.frozen_for, f"`{argument}` has as `frozen_for` of {name!r}"
    if not isinstance(frozen_for, Tensor) or frozen_for.dtype not in (torch.int32, torch.int64) or frozen_for.ndim:
        raise TypeError(f"{where} {described(frozen_for)}; use a 0-d int32 tensor")
    _check_device(f"`{argument}` has for {name!r}", "frozen_for", frozen_for, plan.b.slots.device)
    if param is not None:
        check_fits(argument, name, plan, tuple(param.shape[:-2]), param.factors.a.shape[-2])


def check_plans(argument: str, plans: Any) -> None:
    """Raise if a value is not a dict of plans by name, as `check_plan` checks each."""
    check_by_name(argument, plans, of="plans")
    for name, plan in plans.items():
        check_plan(argument, name, plan)


def check_fits(argument: str, name: str, plan: Plan, stack: tuple[int, ...], rank: int) -> None:
    """Raise ValueError if a plan has stack axes or slots that the factors do not have.

    Inactive entries need valid slots too. Slots that are not on the CPU, or are mapped by `torch.vmap`, are not read.
    While Dynamo traces, nothing is checked.
    """
    if torch.compiler.is_dynamo_compiling():
        return
    for side_name, side in (("b", plan.b), ("a", plan.a)):
        for field, tensor in zip(SidePlan._fields, side, strict=True):
            if not _broadcasts(tuple(tensor.shape[:-1]), stack):
                raise ValueError(
                    f"`{argument}` has for side {side_name} of {name!r} `{field}` of shape {tuple(tensor.shape)}, but "
                    f"the stack has axes {stack}; use those axes or none"
                )
        _check_slots(argument, name, side, side_name, rank)


def _check_slots(argument: str, name: str, side: SidePlan, side_name: str, rank: int) -> None:
    if not can_read(side.slots):
        return
    for slot in side.slots.flatten().tolist():
        if not 0 <= slot < rank:
            raise ValueError(
                f"`{argument}` has slot {slot} for side {side_name} of {name!r}, which has rank {rank}; use slots from "
                f"0 to {rank - 1}, for inactive entries too"
            )


def _check_side(where: str, side: Any) -> None:
    if not isinstance(side, SidePlan):
        raise TypeError(f"{where} {described(side)}; use a SidePlan")
    for field, dtype in _DTYPES.items():
        tensor = getattr(side, field)
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype or not tensor.ndim:
            raise TypeError(f"{where} as `{field}` {described(tensor)}; use a tensor (*stack, count) of {dtype}")
        _check_device(where, field, tensor, side.slots.device)
        if tensor.shape[-1] != side.slots.shape[-1]:
            raise ValueError(
                f"{where} {tensor.shape[-1]} `{field}` and {side.slots.shape[-1]} `slots`; use as many of each"
            )


def _check_device(where: str, field: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{where} `{field}` on {tensor.device}, but other tensors on {device}; move them")


def _broadcasts(axes: tuple[int, ...], stack: tuple[int, ...]) -> bool:
    """Return whether leading axes broadcast to the axes of a stack."""
    if len(axes) > len(stack):
        return False
    last = stack[len(stack) - len(axes) :]
    return all(axis in (1, size) for axis, size in zip(axes, last, strict=True))
