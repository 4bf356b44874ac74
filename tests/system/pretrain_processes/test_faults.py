"""One process that fails, drifts or is killed does not spoil the run."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file

import dynlora_fn as dl
from models.pretrain import method, recorder
from tests.support.paths import ROOT
from tests.support.pretrain import Outcome, metrics
from tests.support.pretrain_processes import arguments, assert_same_run, at_step, job
from tests.support.processes import in_processes, started


def test_a_loss_that_is_not_finite_on_one_process_stops_all(text: Path, tmp_path: Path):
    outcomes = in_processes(3, job, arguments(text, tmp_path / "run"), _spoil_the_loss_of_the_second)
    assert [outcome.code for outcome in outcomes] == [2, 2, 2], outcomes
    assert "`loss` must be finite to go on, got nan at step 14" in outcomes[0].err
    assert outcomes[1].err == outcomes[2].err == ""
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert all(leaf.isfinite().all() for path in saved.glob("*.safetensors") for leaf in load_file(path).values())


def test_processes_whose_clocks_differ_stop_at_the_same_step(text: Path, tmp_path: Path):
    outcomes = in_processes(2, job, arguments(text, tmp_path / "run"), _spoil_the_loss_and_the_clock_of_the_second)
    assert [outcome.code for outcome in outcomes] == [2, 2], outcomes
    assert "`loss` must be finite to go on, got nan at step 14" in outcomes[0].err


def _spoil_the_loss_and_the_clock_of_the_second(process: int) -> None:
    _spoil_the_loss_of_the_second(process)
    if process == 1:
        clock = SimpleNamespace(perf_counter=lambda: 1e6 * time.perf_counter())
        recorder.time = clock


def _spoil_the_loss_of_the_second(process: int) -> None:
    if process == 1:
        loss = method.next_token_loss
        at_step(13, lambda: setattr(method, "next_token_loss", lambda *given: loss(*given) * torch.nan))


def test_a_process_that_drifts_is_named(text: Path, tmp_path: Path):
    outcomes = in_processes(3, job, arguments(text, tmp_path / "run", **{"check-every": 5}), _let_the_third_drift)
    assert [outcome.code for outcome in outcomes] == [2, 2, 2], outcomes
    assert "`state` of processes [2] differs from the majority, first at [0].trainable[" in outcomes[0].err
    assert [line["step"] for line in metrics(tmp_path / "run")][-1] <= 15
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000010"]


def _let_the_third_drift(process: int) -> None:
    if process == 2:
        apply = dl.apply_updates

        def a_little_more(trainable: Any, updates: Any) -> Any:
            new = apply(trainable, updates)
            name = next(iter(new))
            return {**new, name: torch.nextafter(new[name], new[name] + 1)}

        at_step(11, lambda: setattr(dl, "apply_updates", a_little_more))


def test_killed_at_twenty_moments_it_ends_with_the_same_bits(text: Path, tmp_path: Path):
    """All processes restart whenever one is killed, as with `torchrun`."""
    given = {"save-every": 4, "eval-every": 10, "steps": 20}
    since = time.monotonic()
    assert [outcome.code for outcome in in_processes(2, job, arguments(text, tmp_path / "whole", **given))] == [0, 0]
    length, moments = time.monotonic() - since, random.Random(0)
    kills = runs = 0
    while kills < 20:
        out = tmp_path / f"killed-{runs}"
        kills += _kill_until_done(arguments(text, out, **given), moments, length)
        assert_same_run(out, tmp_path / "whole")
        runs += 1


def _kill_until_done(given: list[str], moments: random.Random, length: float) -> int:
    """Return the number of kills in a run that resumes from the last checkpoint after each."""
    for kills in range(100):
        with started(2, _restarted_job, given, kills) as (processes, ends):
            victim = moments.randrange(2)
            if not ends[0].poll(moments.uniform(0, length)):
                processes[victim].kill()
                processes[victim].join()
                continue
            assert ends[0].poll(60)
            return kills
    raise AssertionError("the run never ended")


def _restarted_job(given: list[str], restarts: int) -> Outcome:
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(restarts)
    outcome = job(given)
    assert outcome.code == 0, outcome
    return outcome


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return int(server.getsockname()[1])


def test_torchrun_starts_a_killed_process_anew(text: Path, tmp_path: Path):
    given = {"steps": 60, "save-every": 5, "eval-every": 30}
    assert [outcome.code for outcome in in_processes(2, job, arguments(text, tmp_path / "whole", **given))] == [0, 0]
    out = tmp_path / "killed"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    torchrun += ["--monitor-interval", "0.1", "--master-port", str(free_port()), "-m", "models.pretrain"]
    torchrun += arguments(text, out, **given)
    log, environment = tmp_path / "log", {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        agent = subprocess.Popen(torchrun, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    deadline, lines = time.monotonic() + 120, out / "metrics.jsonl"
    while not (lines.exists() and lines.read_bytes().count(b"\n") >= 20) and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert agent.wait(240) == 0, log.read_text()
    assert "continuing after step" in log.read_text()
    assert "continuing after step 0" not in log.read_text()
    assert_same_run(out, tmp_path / "whole")
