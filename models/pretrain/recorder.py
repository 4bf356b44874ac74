"""What a run writes down and shows as it goes."""

import math
import time
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console

import dynlora_fn as dl
from models.pretrain.method import Metrics
from models.pretrain.report import MetricsFile, ProgressBar

if TYPE_CHECKING:
    from models.pretrain.run import Prepared

_FLUSH_EVERY = 10  # steps between two looks at the device's results


class DivergedError(ValueError):
    """The loss or the gradient is no longer finite."""


class Recorder:
    """Collects metrics without waiting for the device, and writes and shows them a few steps at a time."""

    def __init__(self, run: "Prepared", console: Console):
        self.file = MetricsFile(run.folder / "metrics.jsonl", run.first_step) if run.ranks.is_first else None
        self.bar = ProgressBar(console, run.config.steps, run.first_step)
        self._config, self._ranks = run.config, run.ranks
        self._wire, self._switching = wire_bytes(run), wire_bytes(run, is_switching=True)
        self._pending: list[tuple[int, Metrics, int]] = []
        self._rates: list[float] = []  # tokens a second
        self._since = time.perf_counter()

    def record(self, step: int, metrics: Metrics, switched: int) -> None:
        if len(self._pending) == _FLUSH_EVERY:
            self.flush()
        self._pending.append((step, metrics._replace(outgoing={}), switched))

    def flush(self, validate: Callable[[], dict[str, float]] | None = None) -> None:
        """Writes what is pending; what is validated belongs to the last step of it."""
        if not self._pending:
            return
        lines = [self._line(*pending) for pending in self._pending]  # waits for the device
        tokens_per_step = self._config.grad_accum * self._config.batch_size * self._config.seq_len
        self._rates.append(len(lines) * tokens_per_step / (time.perf_counter() - self._since))
        if validate is not None:
            lines[-1] |= validate()
        if self.file:
            self.file.append(lines)
        steps_left = self._config.steps - lines[-1]["step"]
        self.bar.show(lines[-1], self.tokens_per_second(), steps_left * tokens_per_step / self.tokens_per_second())
        self._pending.clear()
        self._since = time.perf_counter()

    def tokens_per_second(self) -> float:
        """The median, so that compilation and the machine's other work do not count."""
        return median(self._rates) if self._rates else math.nan

    def _line(self, step: int, metrics: Metrics, switched: int) -> dict[str, Any]:
        line = {"step": step + 1, "loss": metrics.loss.item(), "grad_norm": metrics.grad_norm.item()}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(line[name]):
                raise DivergedError(f"`{name}` must be finite to go on, got {line[name]} at step {step + 1}")
        sent = self._switching if switched else self._wire
        wire = {"wire_bytes": sent._asdict()} if self._ranks.size > 1 else {}
        return line | {"lr": self._config.lr_at(step), "switched": switched, **wire}


def wire_bytes(run: "Prepared", *, is_switching: bool = False) -> dl.parallel.WireBytes:
    """Of a step of several processes."""
    (trainable, frozen, _), params, passes = run.method.state, run.method.state.params(), run.config.grad_accum
    plan = run.method.schedule(0, params) if is_switching else None
    if run.config.compensate:  # of dense weights, which are formed once a step
        wire = dl.parallel.wire_bytes(trainable, frozen, gathers=1)
        numbers = sum(param.shape.numel() for param in params.values() if isinstance(param, dl.LowRank))
        return wire._replace(factors=4 * numbers)
    wire = dl.parallel.wire_bytes(trainable, frozen, gathers=2 * passes, plan=plan)
    return wire._replace(scattered=passes * wire.scattered)
