"""Schedules with a rate or a count: which slots are switched at which step.

A plan is a pure function of the step. It is the same on every process and after every resume.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from dynlora_fn._core._check import check_choice, check_flag, check_integer, check_number, check_step
from dynlora_fn._core._check_trees import check_params
from dynlora_fn._core._plans import share_plans
from dynlora_fn._core._types import LowRank, OneSidedFactors, Params, Plan, SidePlan


class Turn(NamedTuple):
    """The number of switches of each side so far.

    Side b counts from ``rank // 2``, and from 0 where only `b` is trained.
    """

    b: int | Tensor
    a: int | Tensor


@dataclass(frozen=True)
class Schedule:
    """A schedule that switches at a rate that decays, or a fixed count at a time.

    No switch meets a frozen vector, at any rank, and nothing is random. After n steps every slot has been switched
    ``turns(n)`` times on each side, up to rounding (arXiv:2406.06564, section 3.2)::

        turns(n) = sum over u < n of decay ** (u + 1) / interval

    Side a has then switched ``floor(rank * turns(n))`` vectors, slot after slot. Side b runs half a turn behind, with
    ``floor(rank * turns(n) + rank / 2)`` counted from ``rank // 2``. The two sides of a slot are therefore switched
    half an interval apart. The mean rate is exact at every rank, including 1.

    Where only `b` is trained, both sides of a slot are switched together, at the times of side a above. A new vector of
    `a` then starts with zeros in `b`.

    A step switches at most min(out, in) - rank vectors of a side, because a pool has no more idle candidates. At full
    rank the factors span the whole space, and nothing is switched. `count` is not limited in this way, except with
    `from_pool`.

    Attributes:
        interval: The number of steps between two switches of the same slot and side before the rate decays. Infinite
            means that nothing is switched.
        decay: The factor by which the rate changes from one step to the next, in (0, 1].
        every: The number of steps between two plans. A plan switches all vectors that have come due.
        count: The number of vectors of each side in each plan, or "all". Default None means that `interval` and `decay`
            set the number.
        freeze: The number of updates for which the counterpart of a switched vector is frozen.
        from_pool: Whether vectors come from a pool, which limits `count` to the idle candidates.

    Raises:
        TypeError: If an attribute, or the step of a call, has a wrong type.
        ValueError: If an attribute is out of range, or the step of a call is negative. Also if a plan would switch a
            slot twice, or a slot while a switch of its other side still freezes it. So `interval` must be at least
            `every`, and at least ``2 * freeze`` with `freeze` rounded up to a multiple of `every`. With `count`, any
            `freeze` steps may switch at most ``rank // 2`` vectors of a side, which a call of the schedule checks. Also
            if `count` is passed together with `interval` or `decay`, which it would ignore.

    Example:
        >>> import torch
        >>> from dynlora_fn import init
        >>> params = init({"w": torch.ones(8, 8)}, rank=4, seed=0, targets=["w"])
        >>> schedule = Schedule(interval=10)
        >>> [schedule.switches(step, params) for step in range(6)]
        [0, 0, 2, 0, 2, 0]
    """

    interval: float = math.inf
    decay: float = 1.0
    every: int = 1
    count: int | Literal["all"] | None = None
    freeze: int = 5
    from_pool: bool = False

    def __post_init__(self) -> None:
        check_flag("from_pool", self.from_pool)
        values: dict[str, Any] = {
            "interval": check_number("interval", self.interval, above=0, finite=False),
            "decay": check_number("decay", self.decay, above=0, most=1),
            "every": check_integer("every", self.every, least=1),
            "freeze": check_integer("freeze", self.freeze, least=0),
        }
        if isinstance(self.count, str):
            check_choice("count", self.count, ("all",), or_none=True)
        elif self.count is not None:
            values["count"] = check_integer("count", self.count, least=1)
        for name, value in values.items():
            object.__setattr__(self, name, value)  # Python numbers in place of NumPy's
        if self.count is None:
            self._check_interval()
        elif self.interval != math.inf or self.decay != 1:
            name = "decay" if self.interval == math.inf else "interval"
            raise ValueError(
                f"`{name}` is {getattr(self, name)}, which `count` = {self.count!r} would ignore; remove one of them"
            )

    def _check_interval(self) -> None:
        if self.interval < self.every:
            raise ValueError(
                f"`interval` must be at least `every` = {self.every}, so that no plan switches a vector twice, "
                f"got {self.interval}"
            )
        shortest = 2 * self.every * math.ceil(self.freeze / self.every)
        if self.interval < shortest:
            raise ValueError(
                f"`interval` must be at least {shortest}, so that no vector is switched while it is frozen for "
                f"{self.freeze} steps, got {self.interval}"
            )

    @property
    def follows_update(self) -> bool:
        """Whether a step must update before it switches, as ReLoRA does.

        The gradient of a vector was computed with the counterpart of the forward pass, and is wrong after the
        counterpart is replaced. A plan with a freeze keeps such vectors in place, so a step may switch before its
        update, as in SwitchLoRA. Without a freeze, a step must switch after its update.
        """
        return self.freeze == 0

    def __call__(self, step: int | Tensor, params: Params) -> dict[str, Plan]:
        """Return the plans of one step by name.

        Args:
            step: The step, counted from 0: an int, or a 0-d int64 tensor in a traced function.
            params: The parameters by name. Only names, shapes and devices are read.

        Returns:
            A plan for every low-rank parameter that can switch. All steps have plans of the same shapes. Parameters
            that switch alike may share one plan object.
        """
        step = check_step("step", step)
        check_params("params", params)
        most = {name: self.most(param) for name, param in params.items() if isinstance(param, LowRank)}
        is_shared = share_plans(len(most))
        plans: dict[str, Plan] = {}
        by_pace: dict[Any, Plan] = {}
        for name, count in most.items():
            param: Any = params[name]
            pace = (param.factors.a.device, *self._pace(param, count)) if is_shared else name
            if count and pace not in by_pace:
                by_pace[pace] = self._plan(step, param, count)
            if count:
                plans[name] = by_pace[pace]
        return plans

    def _pace(self, param: LowRank, most: int) -> tuple[int | None, ...]:
        """Return all values that a plan depends on besides the step and the device."""
        idle = _idle(param) if self._is_limited(param) else None
        return param.factors.a.shape[-2], most, idle, is_one_sided(param)

    def _is_limited(self, param: LowRank) -> bool:
        """Return whether more vectors come due in `every` steps than are idle."""
        return param.factors.a.shape[-2] * self._decayed_steps(self.every) > _idle(param) * self.interval

    def switches(self, step: int, params: Params) -> int:
        """Return how many vectors the step switches in all members of all stacks.

        0 means that its plan can be skipped.
        """
        step = check_integer("step", step, least=0)
        check_params("params", params)
        total = 0
        for param in params.values():
            if isinstance(param, LowRank) and self.most(param):
                before, after = self._turn(step, param), self._turn(step + 1, param)
                most = self.most(param)
                sides = min(int(after.a) - int(before.a), most) + min(int(after.b) - int(before.b), most)
                total += param.seed.numel() * sides
        return total

    def most(self, param: LowRank) -> int:
        """Return the number of entries of a side in the parameter's plans.

        It is the largest number of vectors of a side that one step switches. Steps that switch fewer pad their plans
        with inactive entries.
        """
        rank, idle = param.factors.a.shape[-2], _idle(param)
        if self.count is None:
            return min(math.ceil(self.due(self.every, param)), idle)
        count = min(rank if self.count == "all" else self.count, rank, idle if self.from_pool else rank)
        if self.freeze and count * math.ceil(self.freeze / self.every) > rank // 2:
            raise ValueError(
                f"`count` must be at most {rank // 2} in any {self.freeze} steps at rank {rank}, so that no frozen "
                f"vector is switched, got {count} every {self.every}"
            )
        return count

    @overload
    def due(self, steps: int, param: LowRank) -> float: ...
    @overload
    def due(self, steps: Tensor, param: LowRank) -> Tensor: ...
    def due(self, steps: int | Tensor, param: LowRank) -> float | Tensor:
        """Return the number of vectors of one side that are due after `steps` steps.

        It is rounded only once. Without a decay it reaches integers, and a rounding error just below one would delay
        the switch by a step.
        """
        decayed: float | Tensor = self._decayed_steps(steps)
        if self._is_limited(param):
            return _idle(param) * decayed / self._decayed_steps(self.every)
        return param.factors.a.shape[-2] * decayed / self.interval

    @overload
    def _decayed_steps(self, steps: int) -> float: ...
    @overload
    def _decayed_steps(self, steps: Tensor) -> Tensor: ...
    def _decayed_steps(self, steps: int | Tensor) -> float | Tensor:
        """Return the sum of ``decay ** (u + 1)`` over u < steps."""
        if self.decay == 1:
            return steps
        decayed: float | Tensor = self.decay**steps
        return self.decay * (1 - decayed) / (1 - self.decay)

    def _turn(self, steps: int | Tensor, param: LowRank) -> Turn:
        """Return the number of switches of each side after `steps` steps."""
        rank = param.factors.a.shape[-2]
        if self.count is not None:
            counted = self.most(param) * (steps // self.every)
            return Turn(b=counted if is_one_sided(param) else counted + rank // 2, a=counted)
        if isinstance(steps, Tensor):
            steps = steps.to(torch.float64)
        halves = _floor(2 * self.due(steps - steps % self.every, param))
        return Turn(b=halves // 2 if is_one_sided(param) else (halves + rank) // 2, a=halves // 2)

    def _plan(self, step: int | Tensor, param: LowRank, most: int) -> Plan:
        device, rank = param.factors.a.device, param.factors.a.shape[-2]
        before, after = self._turn(step, param), self._turn(step + 1, param)
        entries = torch.arange(most, device=device)

        def side(start: int | Tensor, end: int | Tensor, ahead: int) -> SidePlan:
            ordinal = entries + start  # position in the sequence of all switches of this side
            return SidePlan(slots=ordinal % rank, indices=ordinal - ahead + rank, active=ordinal < end)

        frozen_for = torch.tensor(self.freeze, dtype=torch.int32, device=device)
        ahead = 0 if is_one_sided(param) else rank // 2
        return Plan(b=side(before.b, after.b, ahead), a=side(before.a, after.a, 0), frozen_for=frozen_for)


def _idle(param: LowRank) -> int:
    """Return how many of the min(out, in) candidates of a side are in no slot."""
    return min(param.shape[-2:]) - param.factors.a.shape[-2]


def is_one_sided(param: LowRank) -> bool:
    """Return whether only `b` is trained, so both sides of a slot switch together."""
    return isinstance(param.factors, OneSidedFactors)


def _floor(value: float | Tensor) -> int | Tensor:
    return value.floor().to(torch.int64) if isinstance(value, Tensor) else math.floor(value)


def never() -> Schedule:
    """Create a schedule that never switches, for plain low-rank training.

    Returns:
        The schedule. It gives no plans.

    Example:
        >>> import torch
        >>> from dynlora_fn import init
        >>> never()(0, init({"w": torch.ones(8, 8)}, rank=4, seed=0, targets=["w"]))
        {}
    """
    return Schedule()


def every(steps: int, count: int | Literal["all"] = "all", *, freeze: int = 0, from_pool: bool = False) -> Schedule:
    """Create a schedule that switches a fixed count every `steps` steps.

    With "all", and zeros as the vectors that enter on side b, a switch is the merge of ReLoRA (arXiv:2307.05695).
    Without a freeze, a step must update before it switches (see `Schedule.follows_update`).

    Args:
        steps: The number of steps between two switches. The first one is at step ``steps - 1``.
        count: The number of vectors of each side, or "all".
        freeze: The number of updates for which the counterpart of a switched vector is frozen.
        from_pool: Whether vectors come from a pool, which limits `count` to the idle candidates.

    Returns:
        The schedule.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If an argument is out of range. A call of the schedule raises it if any `freeze` steps would switch
            more than ``rank // 2`` vectors of a side.

    Example:
        >>> import torch
        >>> from dynlora_fn import init
        >>> params = init({"w": torch.ones(8, 8)}, rank=4, seed=0, targets=["w"])
        >>> [every(3).switches(step, params) for step in range(6)]
        [0, 0, 8, 0, 0, 8]
    """
    if not isinstance(count, str):  # None means a rate in `Schedule`
        count = check_integer("count", count, least=1)
    return Schedule(every=check_integer("steps", steps, least=1), count=count, freeze=freeze, from_pool=from_pool)


def switchlora(
    total_steps: int, *, interval: float = 40, ratio: float = 0.1, decay: float = 0.3, freeze: int = 5, every: int = 1
) -> Schedule:
    """Create SwitchLoRA's schedule (arXiv:2406.06564).

    A slot is switched every `interval` steps at first. The rate then falls to `decay` of its value in every
    ``ratio * total_steps`` steps::

        switches of a slot and side in step u = decay ** ((u + 1) / (ratio * total_steps)) / interval

    The authors' implementation uses 0.3 as `decay`, as here. The paper says one third.

    Args:
        total_steps: The number of steps of the run.
        interval: The number of steps between two switches of the same slot and side before the rate decays. Infinite
            means that nothing is switched.
        ratio: The fraction of the run in which the rate falls by the factor `decay`.
        decay: The factor by which the rate falls, in (0, 1].
        freeze: The number of updates for which the counterpart of a switched vector is frozen.
        every: The number of steps between two plans.

    Returns:
        The schedule.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If an argument is out of range, or `interval` is too short (see `Schedule`).

    Example:
        >>> schedule = switchlora(1000)
        >>> round(schedule.decay**100, 3)
        0.3
    """
    total_steps = check_integer("total_steps", total_steps, least=1)
    ratio, decay = check_number("ratio", ratio, above=0), check_number("decay", decay, above=0, most=1)
    return Schedule(interval=interval, decay=decay ** (1 / (ratio * total_steps)), freeze=freeze, every=every)
