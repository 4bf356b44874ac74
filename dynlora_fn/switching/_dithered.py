"""Round the rate of a schedule at random, as SwitchLoRA's implementation does."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from dynlora_fn._core._check import check_integer, check_step, described
from dynlora_fn._core._check_trees import check_params
from dynlora_fn._core._torch import can_read
from dynlora_fn._core._types import LowRank, Params, Plan, SidePlan
from dynlora_fn.switching._schedule import Schedule, is_one_sided


@dataclass(frozen=True)
class Dithered:
    """A schedule whose numbers of switches were drawn at random by `dithered`."""

    schedule: Schedule
    switched: dict[str, Int[Tensor, "steps *stack"]]  # vectors of a side switched before each step and in all; on CPU
    ranks: dict[str, int]  # of each weight when the numbers were drawn

    @property
    def follows_update(self) -> bool:
        """Whether a step must update first and switch then (see `Schedule`)."""
        return self.schedule.follows_update

    def __call__(self, step: int | Tensor, params: Params) -> dict[str, Plan]:
        """Return the plans of one step by name, as `Schedule.__call__` does."""
        step = self._checked(step, params)
        return {name: self._plan(name, step, params[name]) for name in self.switched}  # type: ignore[arg-type]

    def switches(self, step: int, params: Params) -> int:
        """Return how many vectors the step switches in all members of all stacks."""
        step = int(self._checked(step, params))
        return sum(2 * int((table[step + 1] - table[step]).sum()) for table in self.switched.values())

    def _checked(self, step: int | Tensor, params: Params) -> int | Tensor:
        """Return the step.

        Raises:
            TypeError: If the step or a parameter has a wrong type.
            ValueError: If the step is negative or after the run, a dithered weight is missing, or another weight is
                there.
        """
        step = check_step("step", step)
        check_params("params", params)
        for name, table in self.switched.items():
            if (not isinstance(step, Tensor) or can_read(step)) and step >= len(table) - 1:
                raise ValueError(
                    f"`step` is {int(step)}, but the schedule was dithered for {len(table) - 1} steps, counted from 0;"
                    " use a smaller one, or dither the schedule for more"
                )
            if not isinstance(params.get(name), LowRank):
                raise ValueError(f"`params` has no low-rank {name!r}, for which the schedule was dithered; pass it")
        for name, param in params.items():
            if name not in self.switched and isinstance(param, LowRank) and self.schedule.most(param):
                raise ValueError(
                    f"`params` has the low-rank {name!r}, for which no schedule was dithered; call `dithered` again"
                )
        return step

    def _plan(self, name: str, step: int | Tensor, param: LowRank) -> Plan:
        device, rank = param.factors.a.device, param.factors.a.shape[-2]
        if rank != self.ranks[name]:
            raise ValueError(
                f"{name!r} has rank {rank}, but the schedule was dithered at rank {self.ranks[name]};"
                " call `dithered` again"
            )
        entries = torch.arange(self.schedule.most(param), device=device)
        start = torch.as_tensor(step, device=self.switched[name].device)
        table = self.switched[name].index_select(0, torch.stack([start, start + 1])).to(device)
        before, after = table[..., None]
        ordinal = entries + before  # position in the sequence of all switches of a side

        def side(ahead: int) -> SidePlan:
            return SidePlan(slots=(ordinal + ahead) % rank, indices=ordinal + rank, active=ordinal < after)

        frozen_for = torch.tensor(self.schedule.freeze, dtype=torch.int32, device=device)
        return Plan(b=side(0 if is_one_sided(param) else rank // 2), a=side(0), frozen_for=frozen_for)


def dithered(schedule: Schedule, params: Params, *, total_steps: int, seed: int) -> Dithered:
    """Round the rate of a schedule up or down at random at each step.

    All random numbers are drawn when this function is called, so a plan stays a pure function of the step. SwitchLoRA's
    implementation rounds in the same way (arXiv:2406.06564). With u uniform in [0, 1), each side switches::

        count(step) = floor(rank / interval * decay ** (step + 1) + u)

    Each weight, and each member of a stack, has separate random numbers. Side b runs ``rank // 2`` slots ahead. With a
    freeze, a switch that would meet a frozen vector is dropped. Small ranks then fall short of the schedule's rate, and
    rank 1 never switches. Where only `b` is trained, both sides of a slot are switched together.

    Args:
        schedule: The schedule, with ``count=None`` and ``every=1``.
        params: The parameters by name. Only names and shapes are read.
        total_steps: The number of steps of the run.
        seed: The seed of the random numbers.

    Returns:
        The dithered schedule. Call it as you would call `schedule`.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If `schedule` has a `count`, or an `every` other than 1. A call of the result raises it if the step
            is negative or not below `total_steps`, if a weight is missing or new, or if its rank has changed.

    Example:
        >>> import torch
        >>> from dynlora_fn import init
        >>> params = init({"w": torch.ones(8, 8)}, rank=4, seed=0, targets=["w"])
        >>> schedule = dithered(Schedule(interval=10), params, total_steps=100, seed=0)
        >>> sum(schedule.switches(step, params) for step in range(100))
        48
    """
    if not isinstance(schedule, Schedule):
        raise TypeError(f"`schedule` is {described(schedule)}; pass a Schedule")
    check_params("params", params)
    total_steps = check_integer("total_steps", total_steps, least=1)
    if schedule.count is not None or schedule.every != 1:
        raise ValueError(
            f"`schedule` must have count=None and every=1 to be dithered, got {schedule}; create it with `switchlora`"
        )
    generator = torch.Generator().manual_seed(_generator_seed(check_integer("seed", seed)))
    tables, ranks = {}, {}
    for name, param in params.items():
        if isinstance(param, LowRank) and schedule.most(param):
            shape = total_steps, *param.seed.shape
            draws = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
            tables[name] = _count_switches(schedule, param, draws)
            ranks[name] = param.factors.a.shape[-2]
    return Dithered(schedule, tables, ranks)


def _generator_seed(seed: int) -> int:
    """Return a seed that torch accepts. Those that it accepts stay."""
    return seed if -(2**63) <= seed < 2**64 else seed % 2**64


def _count_switches(schedule: Schedule, param: LowRank, draws: Tensor) -> Tensor:
    """Return how many vectors of a side are switched before each step and in all."""
    # More in any `freeze` steps would switch a frozen vector.
    limit = param.factors.a.shape[-2] // (1 if is_one_sided(param) else 2)
    rate = float(schedule.due(1, param)) / schedule.decay
    switched = torch.zeros(len(draws) + 1, *param.seed.shape, dtype=torch.int64, device=draws.device)
    for step, draw in enumerate(draws):
        due = (rate * schedule.decay ** (step + 1) + draw).floor().long()
        if schedule.freeze:
            recent = switched[step] - switched[max(step + 1 - schedule.freeze, 0)]
            due = torch.minimum(due, limit - recent)
        switched[step + 1] = switched[step] + due
    return switched
