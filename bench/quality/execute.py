"""Execute one run of any method, from its first step to its result."""

import math
import time
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from bench.quality.job import Job
from bench.quality.measures import Tracker
from bench.quality.runs import Run
from models.pretrain.learning_rate import warmup_cosine

EVALUATIONS = 8  # number of evaluations in a run
_WARMUP = 0.05  # warm-up as a fraction of the run


class Method(Protocol):
    """A method with its state in a run."""

    def weights(self) -> dict[str, Tensor]:
        """Return the dense weights for the forward pass."""

    def update(self, step: int, grads: dict[str, Tensor], tokens: Tensor, scale: float) -> None:
        """Take one step from the gradients of the dense weights.

        Learning rates are `scale` times their peaks.
        """

    def bytes(self) -> dict[str, int]:
        """Return the bytes that the method stores beside the dense weights, by kind."""

    def measures(self) -> dict[str, Any]:
        """Return the measurements of the method in the run."""


def execute(job: Job, run: Run, make_method: Callable[[Job, Run], Method]) -> dict[str, Any]:
    """Execute a run, and return its losses, bytes and measurements.

    A run whose loss is not finite ends at this step. Its result has the loss None.
    """
    started, steps = time.perf_counter(), job.size.steps
    method, warmup = make_method(job, run), max(1, round(_WARMUP * steps))
    tracker = Tracker(method.weights())
    curve: list[tuple[int, float]] = []
    for step in range(steps):
        tokens = job.batch(run.seed, step)
        loss, grads = job.gradients(method.weights(), tokens)
        if not math.isfinite(loss.item()):
            return {"loss": None, "diverged": step, "curve": curve, "seconds": time.perf_counter() - started}
        method.update(step, grads, tokens, warmup_cosine(step, steps, warmup))
        if (step + 1) % max(1, steps // EVALUATIONS) == 0 or step + 1 == steps:
            weights = method.weights()
            curve.append((step + 1, job.held_out_loss(weights, run.held_out)))
            tracker.record(weights)
    return {
        "loss": curve[-1][1] if math.isfinite(curve[-1][1]) else None,
        "curve": curve,
        "seconds": time.perf_counter() - started,
        "tokens": steps * job.size.batch * job.size.length,
        "bytes": method.bytes(),
        "measures": {**tracker.measures(), **method.measures()},
    }
