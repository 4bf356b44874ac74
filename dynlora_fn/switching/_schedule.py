"""Which slots are switched in which step: pure functions of the step, equal on every rank and after every resume."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from dynlora_fn._core._types import LowRank, Params, Plan, SidePlan


class Turn(NamedTuple):
    """How many vectors of each side have been switched so far; of side b, rank // 2 are counted ahead."""

    b: int | Tensor
    a: int | Tensor


@dataclass(frozen=True)
class Schedule:
    """Plans of a deterministic number of switches at a rate that decays.

    After n steps every slot has been switched ``turns(n)`` times on each side::

        turns(n) = sum over u < n of decay ** (u + 1) / interval        (arXiv:2406.06564, section 3.2)

    and ``floor(rank * turns(n))`` vectors on side a, slots in turn. Side b runs half a turn behind:
    ``floor(rank * turns(n) + rank / 2)``, counted from rank // 2. So one slot's two sides are switched half an interval
    apart, the mean rate is kept at every rank, 1 included, and no switch meets a frozen vector. Nothing is random.

    A step switches no more vectors of a side than min(out, in) - rank: a pool has no more idle candidates, and at full
    rank, where the factors span all there is, nothing is switched. `count` overrules that, except with `from_pool`.

    Attributes:
        interval: steps between two switches of the same slot and side, at the start. Infinite: never.
        decay: factor on the rate from one step to the next, in (0, 1].
        every: plan only every so many steps, all that is due by then.
        count: plan this many vectors of each side every `every` steps, or "all" of them, instead of by rate.
        freeze: steps that the counterpart of a switched vector stands still.
        from_pool: whether vectors come from a pool, so that `count` too is limited by what is idle.

    Raises:
        ValueError: if a slot would be switched twice in one plan, or on one side while the other side's switch still
            freezes it: ``interval >= 2 * freeze``, rounded up to whole multiples of `every`, and at least `every`.
    """

    interval: float = math.inf
    decay: float = 1.0
    every: int = 1
    count: int | Literal["all"] | None = None
    freeze: int = 5
    from_pool: bool = False

    def __post_init__(self) -> None:
        for name, value, rule, holds in (
            ("interval", self.interval, "be positive", self.interval > 0),
            ("decay", self.decay, "be in (0, 1]", 0 < self.decay <= 1),
            ("every", self.every, "be at least 1", self.every >= 1),
            ("count", self.count, "be at least 1 or 'all'", self.count in (None, "all") or int(self.count) >= 1),
            ("freeze", self.freeze, "not be negative", self.freeze >= 0),
        ):
            if not holds:
                raise ValueError(f"`{name}` must {rule}, got {value}")
        if self.count is None and self.interval < self.every:
            rule = f"be at least `every` = {self.every}, so that no plan switches a vector twice"
            raise ValueError(f"`interval` must {rule}, got {self.interval}")
        least = 2 * self.every * math.ceil(self.freeze / self.every)
        if self.count is None and self.interval < least:
            rule = f"be at least {least}, so that no vector is switched while it is frozen for {self.freeze} steps"
            raise ValueError(f"`interval` must {rule}, got {self.interval}")

    def __call__(self, step: int | Tensor, params: Params) -> dict[str, Plan]:
        """The plan of one step for every low-rank parameter that can switch.

        Args:
            step: number of the step, from 0: an int, or a 0-d int64 tensor where it is traced.
            params: looked at for names, shapes and devices alone.
        """
        plans = {}
        for name, param in params.items():
            if isinstance(param, LowRank) and (most := self.most(param)):
                plans[name] = self._plan(step, param, most)
        return plans

    def switches(self, step: int, params: Params) -> int:
        """How many vectors the step switches in all, stacks counted in full; 0 tells that its plan can be skipped."""
        total = 0
        for param in params.values():
            if isinstance(param, LowRank) and self.most(param):
                before, after = self._turn(step, param), self._turn(step + 1, param)
                most = self.most(param)
                sides = min(int(after.a) - int(before.a), most) + min(int(after.b) - int(before.b), most)
                total += param.seed.numel() * sides
        return total

    def most(self, param: LowRank) -> int:
        """The number of entries in the parameter's plans: the most vectors that one step switches on a side."""
        rank, idle = param.factors.a.shape[-2], _idle(param)
        if self.count is None:
            return min(math.ceil(self.due(self.every, param)), idle)
        count = min(rank if self.count == "all" else self.count, rank, idle if self.from_pool else rank)
        if self.freeze and count * math.ceil(self.freeze / self.every) > rank // 2:
            rule = f"be at most {rank // 2} in any {self.freeze} steps, so that no frozen vector is switched"
            raise ValueError(f"`count` must {rule} at rank {rank}, got {count} every {self.every}")
        return count

    @overload
    def due(self, steps: int, param: LowRank) -> float: ...
    @overload
    def due(self, steps: Tensor, param: LowRank) -> Tensor: ...
    def due(self, steps: int | Tensor, param: LowRank) -> float | Tensor:
        """Vectors of one side that are due after so many steps, rounded once: without a decay, where whole numbers are
        met, a plan must not depend on how a product was rounded."""
        rank, batch = param.factors.a.shape[-2], self._decayed_steps(self.every)
        decayed: float | Tensor = self._decayed_steps(steps)
        if rank * batch > _idle(param) * self.interval:
            return _idle(param) * decayed / batch
        return rank * decayed / self.interval

    @overload
    def _decayed_steps(self, steps: int) -> float: ...
    @overload
    def _decayed_steps(self, steps: Tensor) -> Tensor: ...
    def _decayed_steps(self, steps: int | Tensor) -> float | Tensor:
        """Sum of decay ** (u + 1) over u < steps."""
        if self.decay == 1:
            return steps
        decayed: float | Tensor = self.decay**steps
        return self.decay * (1 - decayed) / (1 - self.decay)

    def _turn(self, steps: int | Tensor, param: LowRank) -> Turn:
        """Where each side stands after so many steps."""
        rank = param.factors.a.shape[-2]
        if self.count is not None:
            counted = self.most(param) * (steps // self.every)
            return Turn(b=counted + rank // 2, a=counted)
        if isinstance(steps, Tensor):
            steps = steps.to(torch.float64)
        halves = _floor(2 * self.due(steps - steps % self.every, param))
        return Turn(b=(halves + rank) // 2, a=halves // 2)

    def _plan(self, step: int | Tensor, param: LowRank, most: int) -> Plan:
        device, rank = param.factors.a.device, param.factors.a.shape[-2]
        before, after = self._turn(step, param), self._turn(step + 1, param)
        entries = torch.arange(most, device=device)

        def side(start: int | Tensor, end: int | Tensor, ahead: int) -> SidePlan:
            number = entries + start  # of the vector among all that this side ever switches
            return SidePlan(slots=number % rank, indices=number - ahead + rank, active=number < end)

        frozen_for = torch.tensor(self.freeze, dtype=torch.int32, device=device)
        return Plan(b=side(before.b, after.b, rank // 2), a=side(before.a, after.a, 0), frozen_for=frozen_for)


def _idle(param: LowRank) -> int:
    """Candidates of a side that are not in use: a pool has min(out, in) in all."""
    return min(param.shape[-2:]) - param.factors.a.shape[-2]


def _floor(value: float | Tensor) -> int | Tensor:
    return value.floor().to(torch.int64) if isinstance(value, Tensor) else math.floor(value)


def never() -> Schedule:
    """No switches: plain low-rank training."""
    return Schedule()


def every(steps: int, count: int | Literal["all"] = "all", *, freeze: int = 0, from_pool: bool = False) -> Schedule:
    """`count` vectors of each side every so many steps. All at once, with vectors that are zero coming in on side b, is
    the merge of ReLoRA (arXiv:2307.05695)."""
    return Schedule(every=steps, count=count, freeze=freeze, from_pool=from_pool)


def switchlora(
    total_steps: int, *, interval: float = 40, ratio: float = 0.1, decay: float = 0.3, freeze: int = 5, every: int = 1
) -> Schedule:
    """The schedule of arXiv:2406.06564: a slot is switched every `interval` steps at first, and the rate falls to
    `decay` of that after ``ratio * total_steps``, and by as much again and again.

    The paper says one third; its implementation, which is followed here, uses 0.3.

    Args:
        total_steps: of the run.
        interval, freeze, every: as in `Schedule`.
    """
    if total_steps < 1 or not ratio > 0:
        raise ValueError(f"`total_steps` and `ratio` must be positive, got {total_steps} and {ratio}")
    return Schedule(interval=interval, decay=decay ** (1 / (ratio * total_steps)), freeze=freeze, every=every)
