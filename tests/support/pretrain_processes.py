"""The main job as a command, in one process of a group."""

import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from models.pretrain import command, run
from models.pretrain.__main__ import main
from models.pretrain.processes import Processes
from tests.support.pretrain import Outcome

MODEL = "--model llama-tiny --rank 8 --batch-size 12 --seq-len 16 --eval-batches 1 --warmup 4 --interval 10 --ratio 1"


def arguments(text: Path, out: Path, **changed: object) -> list[str]:
    chosen = {"steps": 40, "save-every": 10, "eval-every": 20, "text": text, "out": out, **changed}
    flags = [f"--{name}" for name, value in chosen.items() if value is True]
    return [
        *MODEL.split(),
        "--eager",
        *flags,
        *(str(part) for name, value in chosen.items() if value is not True for part in (f"--{name}", value)),
    ]


def job(given: list[str], fault: Callable[[int], None] | None = None, *, processes: Processes | None = None) -> Outcome:
    """Run the command in this process, by default in the group of the process."""
    if processes is None:
        process, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        processes = Processes(process, world_size, torch.distributed.group.WORLD)
    command.join_processes = lambda: contextlib.nullcontext(processes)
    sys.argv = ["pretrain", *given]
    out, err, code = io.StringIO(), io.StringIO(), 0
    if fault:
        fault(processes.process)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def at_step(step: int, act: Callable[[], None]) -> None:
    """Call a function when the batch of a step is drawn."""
    draw = run.batch

    def batch(prepared: Any, now: int) -> torch.Tensor:
        if now == step:
            act()
        return draw(prepared, now)

    run.batch = batch


def assert_same_run(folder: Path, other: Path) -> None:
    last = sorted((other / "checkpoints").glob("step-*"))[-1]
    files = [f"checkpoints/{last.name}/{path.name}" for path in last.iterdir()]
    for name in ("metrics.jsonl", "model.safetensors", *files):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
