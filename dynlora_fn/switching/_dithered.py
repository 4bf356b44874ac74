"""The randomly dithered plan of SwitchLoRA's implementation, as an alternative to `Schedule`'s deterministic one."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from dynlora_fn._core._types import LowRank, Params, Plan, SidePlan
from dynlora_fn.switching._schedule import Schedule


@dataclass(frozen=True)
class Dithered:
    """Plans in which every weight draws its own number of switches; made by `dithered`."""

    schedule: Schedule
    switched: dict[str, Int[Tensor, "steps *stack"]]  # on each side, before each step; on the host

    def __call__(self, step: int | Tensor, params: Params) -> dict[str, Plan]:
        """The plan of one step, as `Schedule.__call__`."""
        return {name: self._plan(name, step, params[name]) for name in self.switched}  # type: ignore[arg-type]

    def switches(self, step: int, params: Params) -> int:
        """How many vectors the step switches in all, stacks counted in full."""
        return sum(2 * int((table[step + 1] - table[step]).sum()) for table in self.switched.values())

    def _plan(self, name: str, step: int | Tensor, param: LowRank) -> Plan:
        device, rank = param.factors.a.device, param.factors.a.shape[-2]
        entries = torch.arange(self.schedule.most(param), device=device)
        at = torch.as_tensor(step).to(self.switched[name].device)
        table = self.switched[name].index_select(0, torch.stack([at, at + 1])).to(device)
        before, after = table[..., None]
        number = entries + before

        def side(ahead: int) -> SidePlan:
            return SidePlan(slots=(number + ahead) % rank, indices=number + rank, active=number < after)

        frozen_for = torch.tensor(self.schedule.freeze, dtype=torch.int32, device=device)
        return Plan(b=side(rank // 2), a=side(0), frozen_for=frozen_for)


def dithered(schedule: Schedule, params: Params, *, total_steps: int, seed: int) -> Dithered:
    """`schedule` as the authors' implementation runs it: each weight and step rounds its rate up or down at random.

    The number executed is the same on both sides, side b rank // 2 slots ahead; what would switch a frozen vector is
    held back and lost, so that small ranks fall short of the rate that is asked for and rank 1 never switches.
    All numbers are drawn here, so that a plan stays a pure function of the step.

    Args:
        schedule: with a rate, not a `count`, and for every step.
        params: looked at for names, shapes and stacks alone.
        total_steps: of the run.
        seed: of the draws.
    """
    if schedule.count is not None or schedule.every != 1:
        raise ValueError(f"`schedule` must go by rate and step by step to be dithered, got {schedule}")
    generator = torch.Generator().manual_seed(seed)
    tables = {}
    for name, param in params.items():
        if isinstance(param, LowRank) and schedule.most(param):
            draws = torch.rand(total_steps, *param.seed.shape, generator=generator, dtype=torch.float64)
            tables[name] = _execute(schedule, param, draws)
    return Dithered(schedule, tables)


def _execute(schedule: Schedule, param: LowRank, draws: Tensor) -> Tensor:
    most_at_once = param.factors.a.shape[-2] // 2  # in any `freeze` steps, or one side would meet a frozen vector
    rate = float(schedule.due(1, param)) / schedule.decay
    switched = torch.zeros(len(draws) + 1, *param.seed.shape, dtype=torch.int64)
    for step, draw in enumerate(draws):
        asked = (rate * schedule.decay ** (step + 1) + draw).floor().long()
        if schedule.freeze:
            lately = switched[step] - switched[max(step + 1 - schedule.freeze, 0)]
            asked = torch.minimum(asked, most_at_once - lately)
        switched[step + 1] = switched[step] + asked
    return switched
