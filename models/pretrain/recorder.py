"""Record metrics while a run trains, without waiting for the device at each step."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any, Literal

from rich.console import Console

import dynlora_fn as dl
from models.pretrain.learning_rate import lr_at
from models.pretrain.method import Metrics
from models.pretrain.prepared import Prepared
from models.pretrain.progress import MetricsFile, ProgressBar
from models.pretrain.tensorboard import Scalars

_FLUSH_EVERY = 10  # the most steps between two reads of results from the device
_FLUSH_SECONDS = 15.0  # the most seconds between two reads, if a step takes less


class DivergedError(ValueError):
    """An error for a loss or a gradient that is not finite any more."""


class Recorder:
    """A collector of metrics that writes and shows several steps at a time."""

    def __init__(self, run: Prepared, console: Console):
        self._files: list[MetricsFile | Scalars] = []
        if run.processes.is_first:
            self._files.append(MetricsFile(run.folder / "metrics.jsonl", run.first_step))
            if run.config.output.tensorboard:
                self._files.append(Scalars(run.folder / "tensorboard", run.first_step))
        status = "compiling the first step" if run.config.machine.compile else ""
        self.bar = ProgressBar(console, run.config.training.steps, run.first_step, status)
        self._config, self._processes, self._corpus = run.config, run.processes, run.corpus
        self._wire, self._wire_when_switching = wire_bytes(run), wire_bytes(run, is_switching=True)
        self._pending: list[tuple[int, Metrics, int]] = []
        self._most_pending = 1  # steps before the next read; the time of the first steps is unknown
        self._rates: list[float] = []  # tokens per second
        self._since = time.perf_counter()

    def record(self, step: int, metrics: Metrics, switched: int) -> None:
        """Add the metrics of a step, and write the pending steps if there are enough."""
        if len(self._pending) >= self._most_pending:
            self.flush()
        self._pending.append((step, metrics._replace(outgoing={}), switched))

    def flush(self, validate: Callable[[], dict[str, float]] | None = None) -> None:
        """Write the pending steps.

        Collective: call it on every process. The first one decides how many steps to collect before the next call, so
        that all stop at the same step if a result is not finite.

        Args:
            validate: A function that returns further metrics of the last pending step. Default None adds none.

        Raises:
            DivergedError: If a loss or a gradient is not finite.
        """
        if not self._pending:
            return
        lines = [self._line(*pending) for pending in self._pending]  # waits for the device
        data = self._config.data
        tokens_per_step = data.grad_accum * data.batch_size * data.seq_len
        seconds = (time.perf_counter() - self._since) / len(lines)  # of a step
        self._rates.append(tokens_per_step / seconds)
        if validate is not None:
            lines[-1] |= validate()
        for file in self._files:
            file.append(lines)
        self._show(lines[-1], tokens_per_step)
        self._pending.clear()
        self._most_pending = self._processes.from_first(max(1, min(_FLUSH_EVERY, int(_FLUSH_SECONDS / seconds))))
        self._since = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Write the pending steps, and leave the block out of the tokens per second."""
        self.flush()
        yield
        self._since = time.perf_counter()

    def _show(self, line: dict[str, Any], tokens_per_step: int) -> None:
        rate = median(self._rates)
        seconds_left = (self._config.training.steps - line["step"]) * tokens_per_step / rate
        validation = line.get("validation_loss")
        text = None if validation is None else self._text(validation, "validation")
        self.bar.show(line["step"], self._text(line["loss"], "train"), text, rate, seconds_left)

    def _text(self, loss: float, part: Literal["train", "validation"]) -> str:
        return f"{loss:.3f} ({self._corpus.bits_per_byte(loss, part):.3f} bits/byte)"

    def tokens_per_second(self) -> float | None:
        """Return the median of the tokens per second, or None if no step was taken.

        A median hardly depends on slow steps, such as a step that is compiled.
        """
        return median(self._rates) if self._rates else None

    def _line(self, step: int, metrics: Metrics, switched: int) -> dict[str, Any]:
        line = {"step": step + 1, "loss": metrics.loss.item(), "grad_norm": metrics.grad_norm.item()}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(line[name]):
                raise DivergedError(f"`{name}` must be finite to go on, got {line[name]} at step {step + 1}")
        sent = self._wire_when_switching if switched else self._wire
        wire = {"wire_bytes": sent._asdict()} if self._processes.world_size > 1 else {}
        return line | {"lr": lr_at(self._config, step), "switched": switched, **wire}


def wire_bytes(run: Prepared, *, is_switching: bool = False) -> dl.parallel.WireBytes:
    """Return the bytes that each process sends in one step."""
    trainable, frozen, _ = run.method.state
    params, passes = run.method.state.params(), run.config.data.grad_accum
    plan = run.method.schedule(0, params) if is_switching else None
    if run.config.training.compensate:  # gradients of dense weights, which are formed once per step
        wire = dl.parallel.wire_bytes(trainable, frozen, gathers=1)
        elements = sum(param.shape.numel() for param in params.values() if isinstance(param, dl.LowRank))
        return wire._replace(factors=4 * elements)
    wire = dl.parallel.wire_bytes(trainable, frozen, gathers=2 * passes, plan=plan)
    return wire._replace(scattered=passes * wire.scattered, factors=wire.factors + _bytes_of_muon(run))


def _bytes_of_muon(run: Prepared) -> int:
    """Return the bytes that Muon all-reduces for sharded factors.

    It all-reduces four matrices of shape (rank, rank) for each weight.
    """
    if run.config.inner_optimizer() != "muon":
        return 0
    leaves = run.method.state.trainable.values()
    sides = [leaf.b for leaf in leaves if isinstance(leaf, dl.parallel.ShardedFactors)]  # (*stack, rows, rank)
    return sum(16 * b.shape[:-2].numel() * b.shape[-1] ** 2 for b in sides)
