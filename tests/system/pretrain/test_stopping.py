"""However a run ends before its last step: the message, the exit code, what is left, and the bits after --resume."""

import contextlib
import errno
import io
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

import dynlora_fn as dl
from models.pretrain import checkpoint, progress, run
from models.pretrain import folder as run_folders
from models.pretrain.__main__ import main
from models.pretrain.stopping import last_checkpoint
from tests.support.pretrain import SMALL, Job, Outcome, contents
from tests.support.pretrain_processes import assert_same_run

FULL = "No space left on device"


@contextlib.contextmanager
def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> Iterator[None]:
    """Call a function when the batch of a step is drawn, and all earlier checkpoints are written."""
    draw, written = run.batch, list[Future[Any]]()

    class Thread(ThreadPoolExecutor):
        def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
            written.append(super().submit(*args, **kwargs))
            return written[-1]

    def batch(prepared: Any, now: int) -> torch.Tensor:
        if now == step:
            wait(written)
            act()
        return draw(prepared, now)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "ThreadPoolExecutor", Thread)
        patch.setattr(run, "batch", batch)
        yield


def call(arguments: list[object]) -> Outcome:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["pretrain", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Outcome(code, " ".join(out.getvalue().split()), err.getvalue())


@pytest.fixture(autouse=True)
def _signals_of_a_terminal() -> Iterator[None]:
    """Handle signals as in a terminal. A test run in the background or below `nohup` ignores some."""
    default = signal.SIG_DFL
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: default, signal.SIGHUP: default}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[object], Path]:
    """Return the arguments of a run without its folder, and the folder of that run."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "text.txt").write_text("".join(f"{k} times {k} is {k * k}\n" for k in range(300)))
    arguments = [*SMALL, "--text", folder / "text.txt", "--steps", 20, "--save-every", 10]
    assert call([*arguments, "--out", folder / "run"]).code == 0
    return arguments, folder / "run"


def send(*numbers: int) -> Callable[..., contextlib.AbstractContextManager[None]]:
    def fault(monkeypatch: pytest.MonkeyPatch) -> contextlib.AbstractContextManager[None]:
        return at_step(monkeypatch, 12, lambda: [os.kill(os.getpid(), number) for number in numbers])

    return fault


@contextlib.contextmanager
def full_at_checkpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Limit the size of files, the closest limit of a process to a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))  # noqa: E731
        with at_step(monkeypatch, 15, limit):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def full_at_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    save = dl.interop.save_weights

    def fail(weights: Any, path: Path, **options: Any) -> None:
        if path.name == "model.safetensors":
            raise OSError(errno.ENOSPC, FULL)
        save(weights, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(dl.interop, "save_weights", fail)
        yield


@contextlib.contextmanager
def failing_metrics(monkeypatch: pytest.MonkeyPatch, number: int) -> Iterator[None]:
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch, at_step(patch, 12, lambda: patch.setattr(progress, "os", failing)):
        failing = SimpleNamespace(fsync=fail)
        yield


class Interruption(NamedTuple):
    fault: Callable[[pytest.MonkeyPatch], contextlib.AbstractContextManager[None]]
    code: int
    message: str
    left: int  # the step of the last checkpoint


INTERRUPTIONS = {
    "Ctrl-C": Interruption(send(signal.SIGINT), 130, "stopped by Ctrl-C after a checkpoint of step 15: continue", 15),
    "Ctrl-C twice": Interruption(send(signal.SIGINT, signal.SIGINT), 130, "stopped at once by Ctrl-C; the last", 10),
    "SIGTERM": Interruption(send(signal.SIGTERM), 0, "stopped by SIGTERM after a checkpoint of step 15: continue", 15),
    "SIGTERM and Ctrl-C": Interruption(send(signal.SIGTERM, signal.SIGINT), 0, "stopped by SIGTERM after", 15),
    "SIGHUP": Interruption(send(signal.SIGHUP), 0, "", 15),  # there is no terminal any more
    "disk full at a checkpoint": Interruption(
        full_at_checkpoint, 2, "error: the checkpoint of step 20 could not be written: [Errno 27] File too large", 10
    ),
    "disk full at the metrics": Interruption(
        lambda patch: failing_metrics(patch, errno.ENOSPC), 2, f"error: {FULL}: '{{run}}/metrics.jsonl'", 10
    ),
    "read-only file system": Interruption(
        lambda patch: failing_metrics(patch, errno.EROFS), 2, "error: Read-only file system: '{run}/metrics.jsonl'", 10
    ),
    "disk full at the model": Interruption(full_at_model, 2, f"error: {FULL}: '{{run}}", 20),
}


@pytest.mark.parametrize("name", INTERRUPTIONS)
def test_an_interrupted_run_says_what_is_left_and_resumes_to_the_same_bits(
    uninterrupted: tuple[list[object], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    arguments, whole = uninterrupted
    interruption, folder = INTERRUPTIONS[name], tmp_path / "run"
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with interruption.fault(monkeypatch):
        outcome = call([*arguments, "--out", folder])
    assert outcome.code == interruption.code, outcome
    message = outcome.err if interruption.code == 2 or "at once" in interruption.message else outcome.out
    assert interruption.message.format(run=folder) in message
    assert last_checkpoint(folder) == interruption.left
    if message == outcome.err:
        assert message.count("\n") == 1
        assert f"; the last checkpoint is step {interruption.left}; continue with " in message
    if interruption.message:
        assert f"continue with python -m models.pretrain --out {folder} --resume" in message
    else:
        assert "continue" not in message
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers
    resumed = call(["--out", folder, "--resume"])
    assert resumed.code == 0, resumed
    assert f"continuing after step {interruption.left}" in resumed.out
    assert_same_run(folder, whole)
    assert not [path.name for path in tmp_path.iterdir() if path != folder]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_first_step_leaves_nothing(
    uninterrupted: tuple[list[object], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    from models.pretrain import reading  # noqa: PLC0415

    monkeypatch.setattr(reading.text, "byte_tokenizer", lambda: os.kill(os.getpid(), number))
    outcome = call([*uninterrupted[0], "--out", tmp_path / "run"])
    assert outcome.code == 128 + number
    name = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}[number]
    assert outcome.err == f"stopped at once by {name}; no step was taken\n"
    assert not list(tmp_path.iterdir())


def test_a_signal_that_the_parent_ignores_stays_ignored(
    uninterrupted: tuple[list[object], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does
    try:
        with send(signal.SIGHUP)(monkeypatch):
            assert call([*uninterrupted[0], "--out", tmp_path / "run"]).code == 0
        assert_same_run(tmp_path / "run", uninterrupted[1])
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_finished_run_keeps_its_summary(uninterrupted: tuple[list[object], Path]):
    _, whole = uninterrupted
    before = contents(whole)
    outcome = call(["--out", whole, "--resume", "--json"])
    assert outcome.code == 0, outcome.err
    assert "validation loss" in outcome.out
    after = contents(whole)
    assert {name for name in before if before[name] != after.get(name)} <= {"loss.png"}


def test_a_longer_run_says_what_changes_and_keeps_its_options(uninterrupted: tuple[list[object], Path], tmp_path: Path):
    arguments, folder = uninterrupted[0], tmp_path / "run"
    assert call([*arguments, "--out", folder, "--lr", 0.001]).code == 0
    outcome = call(["--out", folder, "--resume", "--steps", 30, "--save-every", 5])
    assert outcome.code == 0, outcome.err
    assert "steps were 20 and are 30: learning rate and switches follow the schedule of 30 steps" in outcome.out
    assert "the rate of step 21 is 0.000" in outcome.out
    assert last_checkpoint(folder) == 30
    lines = progress.read_metrics(folder / "metrics.jsonl")
    assert len(lines) == 30
    assert max(line["lr"] for line in lines) <= 0.001
    assert lines[20]["lr"] > lines[19]["lr"]
    refused = call(["--out", folder, "--resume", "--steps", 20])
    assert refused.code == 2
    assert "`steps` must be at least the step of the checkpoint" in refused.err
    assert call(["--out", folder, "--resume"]).code == 0  # its record has 30 steps


BAD_FOLDERS = {
    "below a file": ("text.txt/run", "error: Not a directory: "),
    "too long": ("x" * 300, "error: File name too long: "),
    "not UTF-8": ("\udcff", "error: `out` must be a name in UTF-8"),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_folder_that_cannot_be_written_is_one_line(
    uninterrupted: tuple[list[object], Path], tmp_path: Path, name: str
):
    (tmp_path / "text.txt").write_text("text")
    out, message = BAD_FOLDERS[name]
    outcome = call([*uninterrupted[0], "--out", tmp_path / out])
    assert outcome.code == 2
    assert outcome.err.startswith(message)
    assert outcome.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_folder_without_permission_is_one_line(
    uninterrupted: tuple[list[object], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(run_folders.os, "access", lambda *_: False)
    outcome = call([*uninterrupted[0], "--out", tmp_path / "run"])
    assert outcome.code == 2
    assert outcome.err == f"error: the folder cannot be written: '{tmp_path}'; no step was taken\n"
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_no_utf8_is_trained_on(job: Job, tmp_path: Path, text: Path):
    (text / "0.txt").rename(text / "\udcff.txt")
    outcome = job("--out", tmp_path / "run", "--steps", 2)
    assert outcome.code == 0, outcome.err
