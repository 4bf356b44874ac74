"""Take a llama of 1.09 billion parameters through a whole run, in 24 GiB.

The parts are `init`, an eager and a compiled step, all files, and a resume. Each part runs in a separate process that
starts from the file of the model. Only the work of a part is timed, without its preparation.
"""

import gc
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

import dynlora_fn as dl
from bench.growth.models import LLAMAS, llama, meta_llama
from bench.support.harness import run_in_subprocess, table
from bench.support.process_memory import MB, RETURN_FREED_MEMORY, peak_bytes, reset_peak, resident_bytes
from bench.support.training_steps import loss_of
from models.llama import TARGETS, Llama, LlamaConfig
from models.pretrain.checkpoint import Saver, load_checkpoint
from models.pretrain.processes import SINGLE_PROCESS

_RANK, _TOKENS, _THREADS = 32, 64, 2
_LIMIT = 24 * 2**30
_FILES = 20e9  # bytes of the files for one dtype
_DTYPES = ("float32", "bfloat16")


class Run(NamedTuple):
    """The folder and the model of a run."""

    folder: Path
    dtype: torch.dtype
    config: LlamaConfig

    @property
    def model(self) -> Llama:
        """The model on the meta device."""
        return meta_llama(self.config, self.dtype)

    def init(self) -> dict[str, Any]:
        """Initialize the parameters from the file of the model."""
        weights = dl.interop.open_weights(self.folder / "model.safetensors")
        return dl.init(self.model, weights=weights, rank=_RANK, seed=0, targets=TARGETS)

    def state(self) -> Any:
        """Return the initial state of a training run."""
        trainable, frozen = dl.partition(self.init())
        return trainable, frozen, dl.optim.adamw().init(trainable)

    def dense(self) -> Llama:
        """Return the model with its weights."""
        model = self.model
        weights = dict(dl.interop.open_weights(self.folder / "model.safetensors"))
        model.load_state_dict(weights, assign=True)
        return model


Part = Callable[[Run], Callable[[], Any]]  # a function that prepares a part and returns the function to measure


def init(run: Run) -> Callable[[], Any]:
    return run.init


def init_from_model(run: Run) -> Callable[[], Any]:
    return partial(dl.init, run.dense(), rank=_RANK, seed=0, targets=TARGETS)


def step_of(run: Run) -> Callable[..., Any]:
    """Return a step that switches and updates."""
    model, optimizer = run.model, dl.optim.adamw()

    def step(state: Any, tokens: Tensor, lr: Tensor, plan: Any) -> Any:
        trainable, frozen, opt_state = state
        loss_fn = lambda tree: loss_of(dl.call(model, dl.combine(tree, frozen), tokens[:, :-1]), tokens)  # noqa: E731
        loss, grads = dl.value_and_grad(loss_fn)(trainable)
        params, _ = dl.switch(dl.combine(trainable, frozen), plan)
        opt_state = dl.project_optimizer_state(opt_state, plan)
        trainable, frozen = dl.partition(params)
        updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=lr)
        return (dl.apply_updates(trainable, updates), frozen, opt_state), loss

    return step


def arguments_of(run: Run) -> tuple[Any, ...]:
    state = run.state()
    tokens = torch.randint(run.config.vocabulary, (1, _TOKENS + 1))
    plan = dl.schedules.every(1, 1)(1, dl.combine(*state[:2]))
    return state, tokens, torch.tensor(1e-3), plan


def eager_step(run: Run) -> Callable[[], Any]:
    return partial(step_of(run), *arguments_of(run))


def compiled_step(run: Run) -> Callable[[], Any]:
    """Measure two calls. The first one compiles."""
    arguments, step = arguments_of(run), dl.compile_step(step_of(run))

    def twice() -> Any:
        step(*arguments)
        return step(*arguments)

    return twice


def save_merged(run: Run) -> Callable[[], Any]:
    return partial(dl.interop.save_merged, run.model, run.init(), run.folder / "merged")


def save_adapter(run: Run) -> Callable[[], Any]:
    params, original = run.init(), dl.interop.open_weights(run.folder / "model.safetensors")
    return partial(dl.interop.save_adapter, run.model, params, run.folder / "adapter", original=original, rank=_RANK)


def load_adapter(run: Run) -> Callable[[], Any]:
    return partial(dl.interop.load_adapter, run.dense(), run.folder / "adapter", seed=0)


def checkpoint(run: Run) -> Callable[[], Any]:
    state, folder = run.state(), run.folder / "checkpoints"
    folder.mkdir(exist_ok=True)

    def save() -> None:
        with Saver(folder, SINGLE_PROCESS, keep=1) as saver:
            saver.start(1, state)

    return save


def resume(run: Run) -> Callable[[], Any]:
    return partial(load_checkpoint, run.folder / "checkpoints", run.state(), SINGLE_PROCESS)


PARTS: dict[str, Part] = {
    "init": init_from_model,
    "init from a file": init,
    "eager step": eager_step,
    "compiled step": compiled_step,
    "save_merged": save_merged,
    "save_adapter": save_adapter,
    "load_adapter": load_adapter,
    "checkpoint": checkpoint,
    "resume": resume,
}


def measure(part: str, dtype: str, folder: Path, quick: bool) -> dict[str, float]:
    """Return the seconds and the peaks of a part.

    ``peak`` is the peak of its work, and ``process`` also includes the preparation. ``state`` is the memory in use
    before the work.
    """
    run = Run(folder, getattr(torch, dtype), LLAMAS[1 if quick else 1090])
    work = PARTS[part](run)
    gc.collect()
    before, prepared = resident_bytes("cpu"), peak_bytes("cpu")
    reset_peak("cpu")
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    found = {"seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - processor}
    peak = peak_bytes("cpu")
    del result
    return found | {"state": before, "peak": peak, "process": max(prepared, peak)}


def run(console: Console, folder: Path | None, quick: bool) -> tuple[dict[str, float], dict[str, Any]]:
    """Run all parts in both dtypes, and print a table.

    Return the summary and all figures.

    Raises:
        SystemExit: If the disk has not enough space for the files of one dtype.
    """
    free = shutil.disk_usage(folder or tempfile.gettempdir()).free
    if free < _FILES and not quick:
        raise SystemExit(f"`folder` has {free / 1e9:.0f} GB free; choose one with {_FILES / 1e9:.0f} GB")
    raw = {}
    for dtype in _DTYPES:
        with tempfile.TemporaryDirectory(dir=folder) as files:
            raw[dtype] = _measure_all(Path(files), dtype, quick)
        rows = [
            [
                name,
                part["seconds"],
                part["processor_seconds"],
                *(part[key] / MB for key in ("state", "peak", "process")),
            ]
            for name, part in raw[dtype].items()
        ]
        columns = ["part", "seconds", "processor seconds", "before, MB", "peak, MB", "peak of the process, MB"]
        console.print(table(f"llama of {1 if quick else 1090} million parameters, {dtype}", columns, rows))
    peak = max(part["process"] for parts in raw.values() for part in parts.values())
    console.print(f"peak of all: {peak / 2**30:.2f} GiB, {'within' if peak <= _LIMIT else 'beyond'} 24 GiB")
    seconds = {f"{dtype}: {name}": part["seconds"] for dtype, parts in raw.items() for name, part in parts.items()}
    return {"peak_of_all": peak, **seconds}, raw


def _measure_all(folder: Path, dtype: str, quick: bool) -> dict[str, Any]:
    """Write the model, and measure all parts.

    With `quick`, they are measured in this process, without the compiled step.
    """
    model = llama(1 if quick else 1090, getattr(torch, dtype))
    save_file(model.state_dict(), folder / "model.safetensors")
    llama.cache_clear()
    del model
    if quick:
        return {part: measure(part, dtype, folder, quick) for part in PARTS if part != "compiled step"}
    flags = ["--dtype", dtype, "--folder", str(folder), "--threads", str(_THREADS)]
    return {part: run_in_subprocess("bench.growth", ["--part", part, *flags], RETURN_FREED_MEMORY) for part in PARTS}
