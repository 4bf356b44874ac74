"""Train factors on a frozen base with LoRA, ReLoRA or SwitchLoRA."""

import math
from collections.abc import Mapping
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import dynlora_fn as dl
from bench.quality import study_schedules
from bench.quality.job import Job, optimizer_of, rounded
from bench.quality.measures import overlap
from bench.quality.runs import SIZES, Run
from bench.support.process_memory import count_bytes
from models.llama import TARGETS

_MEASURED_SWITCHES = 16  # number of switches around which the loss is measured, evenly spaced in a run
_PRUNE = 0.99  # fraction of the moments that ReLoRA prunes (arXiv:2307.05695)


class LowRankMethod:
    """A run that trains factors, with its schedule, pool and measurements."""

    def __init__(self, job: Job, run: Run):
        self._job, self._run = job, run
        self._update_step = job.update(run.settings(), run.rank(), run.trained, run.factors)
        start: dl.switching.Start = run.start if run.method == "switchlora" else "lora"
        vectors = {"start": start, "trained": run.trained, "dtype": getattr(torch, run.factors)}
        params = dl.init(job.initial(run.seed), rank=run.rank(), seed=run.seed, targets=TARGETS, **vectors)
        if run.start_scale != 1:
            params = {name: _scaled(param, run.start_scale) for name, param in params.items()}
        self.params = dl.bases.quantize(params, run.codes(), residual=run.residual()) if run.codes() else params
        self._opt_state = optimizer_of(run.settings()).init(dl.partition(self.params).trainable)
        self._start = start
        self._schedule = study_schedules.schedule_of(run, self.params)
        self._pool = dl.switching.init_pool(self.params) if run.candidates == "pool" else None
        self._generator = torch.Generator().manual_seed(run.seed)
        self._jumps: list[tuple[int, float, float, float]] = []
        self._rows = self._spans()
        self._overlaps: list[float] = []
        self._switched = 0

    def weights(self) -> dict[str, Tensor]:
        return dl.materialize(self.params)

    def update(self, step: int, grads: dict[str, Tensor], tokens: Tensor, scale: float) -> None:
        factor_grads = rounded(dl.optim.project_gradients(grads, self.params), self._run.gradients)
        self._compensate(step, grads, scale)
        switched = self._schedule.switches(step, self.params)
        self._switched += switched
        is_measured = switched and len(self._jumps) * SIZES[self._run.size].steps <= step * _MEASURED_SWITCHES
        if self._schedule.follows_update:
            self._move(step, factor_grads, scale)
        losses = [self._loss(tokens)] if is_measured else []
        if switched:
            self._switch(step)
        losses += [self._loss(tokens)] if is_measured else []
        if not self._schedule.follows_update:
            self._move(step, factor_grads, scale)
        if is_measured:
            self._jumps.append((step, *losses, self._loss(tokens)))
        if (step + 1) % (SIZES[self._run.size].steps // 8) == 0:
            self._measure_overlap()

    def _move(self, step: int, grads: Any, scale: float) -> None:
        self._decay(scale)
        trainable, frozen = dl.partition(self.params)
        state = (trainable, self._opt_state)
        (trainable, self._opt_state), _ = self._update_step(state, grads, self._rates(step, scale))
        self.params = dl.combine(trainable, frozen)

    def _decay(self, scale: float) -> None:
        run = self._run
        if run.weight_decay:
            rates = dict.fromkeys(_low_rank(self.params), run.lr * scale * run.weight_decay)
            self.params |= dl.optim.decay({name: self.params[name] for name in rates}, rates)

    def _compensate(self, step: int, grads: dict[str, Tensor], scale: float) -> None:
        run = self._run
        if run.compensate and step % run.compensate_every == 0:
            inner = {name: grads[name] for name in _low_rank(self.params)}
            inner = {name: in_int8(grad) for name, grad in inner.items()} if run.reduced == "int8" else inner
            lr = run.lr * scale * run.compensate
            self.params = dl.optim.compensate(self.params, inner, lr=lr, normalize=run.normalize)

    def _rates(self, step: int, scale: float) -> dict[str, Any]:
        run = self._run
        if run.method == "relora":  # the warm-up is repeated after each merge, over a twentieth of the interval
            every = max(1, round(run.merge_every * SIZES[run.size].steps))
            warmup = max(1, round(every / 20))
            scale *= min(1.0, (step % every + 1) / warmup) if step >= every else 1.0
        lr, side = torch.tensor(run.lr * scale), math.sqrt(run.side_lr)
        factors = lr if side == 1 else dl.Factors(b=lr * side, a=lr / side)
        dense = lr * run.dense_lr
        return {name: factors if isinstance(param, dl.LowRank) else dense for name, param in self.params.items()}

    def _switch(self, step: int) -> None:
        run, before = self._run, self.params
        plan = self._schedule(step, before)
        if run.incoming == "zero":
            plan = study_schedules.both_sides(plan)
        if run.order == "random" and self._pool is not None:
            plan = study_schedules.at_random(plan, self._pool, self._generator)
        self.params, outgoing = dl.switch(before, plan, incoming=self._incoming(plan))
        if self._pool is not None:
            self._pool = dl.switching.put_back(self._pool, plan, outgoing, donate=True)
        rule = "prune" if run.method == "relora" else run.rule
        change = dl.optim.Change(before, self.params) if rule == "transport" else None
        self._opt_state = dl.project_optimizer_state(self._opt_state, plan, rule=rule, prune=_PRUNE, change=change)

    def _incoming(self, plan: dict[str, dl.Plan]) -> dict[str, dl.Factors]:
        run = self._run
        if self._pool is not None:
            incoming = dl.switching.draw(self._pool, plan)
        else:
            incoming = dl.candidates(self.params, plan, start=self._start)
        if run.start_scale != 1 and self._pool is None:
            incoming = tree_map(lambda leaf: leaf * run.start_scale, incoming)
        if run.candidates == "orthogonal":
            incoming = study_schedules.outside_span(incoming, self.params)
        if run.incoming == "zero":
            incoming = {name: factors._replace(b=torch.zeros_like(factors.b)) for name, factors in incoming.items()}
        return incoming

    def _loss(self, tokens: Tensor) -> float:
        with torch.no_grad():
            return self._job.loss(self.weights(), tokens).item()

    def _spans(self) -> dict[str, Tensor]:
        return {name: param.factors.a.clone() for name, param in _low_rank(self.params).items()}

    def _measure_overlap(self) -> None:
        before, self._rows = self._rows, self._spans()
        self._overlaps.append(mean(overlap(before[name], rows).mean().item() for name, rows in self._rows.items()))

    def bytes(self) -> dict[str, int]:
        low_rank = _low_rank(self.params).values()
        return {
            "state": count_bytes(self._opt_state),
            "factors": count_bytes([param.factors for param in low_rank]),
            "bases": count_bytes([_codes_and_residual(param.base) for param in low_rank]),
            "candidates": count_bytes(self._pool),
        }

    def measures(self) -> dict[str, Any]:
        jumps = [abs(after - before) for _, before, after, _ in self._jumps]
        return {
            "switched": self._switched,
            # The step, and the losses on its batch before the switch, after the switch and after the update.
            "losses_around_switches": self._jumps,
            "largest_jump": max(jumps, default=0.0),
            "overlaps": self._overlaps,
            # float8 has no `isfinite`.
            "finite": all(leaf.float().isfinite().all().item() for leaf in tree_leaves(self.params)),
        }


def _low_rank(params: Mapping[str, Any]) -> dict[str, dl.LowRank]:
    return {name: param for name, param in params.items() if isinstance(param, dl.LowRank)}


def in_int8(grad: Tensor) -> Tensor:
    """Round each row to 255 levels."""
    step = grad.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(grad.dtype).tiny) / 127
    return (grad / step).round() * step


def _scaled(param: Any, scale: float) -> Any:
    """Multiply the factors by `scale` and adapt the base, so that the weight is equal."""
    if not isinstance(param, dl.LowRank):
        return param
    factors = dl.Factors(*(leaf * scale for leaf in param.factors))
    weight = dl.materialize(param)
    product = dl.materialize(dl.LowRank(torch.zeros_like(weight), factors, param.seed))
    return dl.LowRank(weight - product, factors, param.seed)


def _codes_and_residual(base: Any) -> Any:
    return base if isinstance(base, Tensor) else (base.codes, base.residual)
