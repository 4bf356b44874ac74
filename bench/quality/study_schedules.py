"""Choose when the low-rank methods switch, and which vectors enter."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import dynlora_fn as dl
from bench.quality.runs import SIZES, Run

_DECAY = 0.3  # factor of the switching rate in every fraction `ratio` of the run (arXiv:2406.06564)


def schedule_of(run: Run, params: Mapping[str, Any]) -> dl.schedules.Schedule | dl.schedules.Dithered:
    """Build the schedule of a run."""
    steps = SIZES[run.size].steps
    if run.method == "lora":
        return dl.schedules.never()
    if run.method == "relora":
        return dl.schedules.every(max(1, round(run.merge_every * steps)))
    decay = _DECAY ** (1 / (run.ratio * steps)) if run.ratio else 1.0
    interval = run.interval / 2 if run.incoming == "zero" else run.interval  # both sides switch at once
    plain = dl.schedules.Schedule(interval=interval, decay=decay, freeze=run.freeze, every=run.every)
    return plain if run.floor == 0 and run.until == 1 else _tabled(plain, run, params)


def _tabled(plain: dl.schedules.Schedule, run: Run, params: Mapping[str, Any]) -> dl.schedules.Dithered:
    """Build a schedule whose switching rate has a floor or an end."""
    steps = SIZES[run.size].steps
    at = torch.arange(1, steps + 1, dtype=torch.float64)
    rate = (plain.decay**at).clamp(min=run.floor) * (at <= run.until * steps)
    turns = torch.cat([torch.zeros(1, dtype=torch.float64), (rate / plain.interval).cumsum(0)])
    tables, ranks = {}, {}
    for name, param in params.items():
        if isinstance(param, dl.LowRank):
            ranks[name] = param.factors.a.shape[-2]
            table = (ranks[name] * turns).floor().long()
            tables[name] = table.reshape(-1, *(1 for _ in param.seed.shape)).expand(-1, *param.seed.shape).contiguous()
    return dl.schedules.Dithered(plain, tables, ranks)


def both_sides(plan: dict[str, dl.Plan]) -> dict[str, dl.Plan]:
    """Use the plan of side a for both sides.

    Both vectors of a slot are then switched at once.
    """
    return {name: sides._replace(b=sides.a) for name, sides in plan.items()}


def at_random(
    plan: dict[str, dl.Plan], pool: Mapping[str, dl.switching.Pool], generator: torch.Generator
) -> dict[str, dl.Plan]:
    """Change a plan to draw idle rows of the pool at random instead of in turn."""

    def side(plan: dl.SidePlan, pool: dl.switching.SidePool) -> dl.SidePlan:
        is_idle = torch.ones(pool.vectors.shape[:-1]).scatter(-1, pool.held, 0.0)
        flat = is_idle.reshape(-1, is_idle.shape[-1])
        rows = torch.multinomial(flat, plan.slots.shape[-1], generator=generator)
        return plan._replace(
            slots=plan.slots.expand(*is_idle.shape[:-1], -1),
            indices=rows.reshape(*is_idle.shape[:-1], -1),
            active=plan.active.expand(*is_idle.shape[:-1], -1),
        )

    return {
        name: sides._replace(b=side(sides.b, pool[name].b), a=side(sides.a, pool[name].a))
        for name, sides in plan.items()
    }


def outside_span(incoming: dict[str, dl.Factors], params: Mapping[str, Any]) -> dict[str, dl.Factors]:
    """Remove the part of the vectors inside the span of the factors.

    The vectors keep their lengths.
    """

    def of_rows(vectors: Tensor, rows: Tensor) -> Tensor:
        basis = torch.linalg.qr(rows.mT).Q  # (*stack, n, rank)
        rest = vectors - vectors @ basis @ basis.mT
        return rest * (vectors.norm(dim=-1, keepdim=True) / rest.norm(dim=-1, keepdim=True))

    return {
        name: dl.Factors(
            b=of_rows(vectors.b.mT, params[name].factors.b.mT).mT.contiguous(),
            a=of_rows(vectors.a, params[name].factors.a),
        )
        for name, vectors in incoming.items()
    }
