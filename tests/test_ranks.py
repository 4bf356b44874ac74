"""The main job in several processes: the same run on any number of them, and what it survives."""

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from damage import damage_by_a_bit, damage_by_truncation
from ranks import in_ranks, started
from safetensors.torch import load_file

import dynlora_fn as dl
from models.pretrain import command, method, run
from models.pretrain.__main__ import main
from models.pretrain.checkpoint import Saver, load_checkpoint
from models.pretrain.ranks import ALONE, Ranks

ROOT = Path(__file__).parent.parent
MODEL = "--model llama-tiny --rank 8 --batch-size 12 --seq-len 16 --eval-batches 1 --warmup 4 --interval 10 --ratio 1"


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number in range(6):
        (folder / f"{number}.txt").write_text("".join(f"{number} times {k} is {number * k}\n" for k in range(60)))
    return folder


def arguments(text: Path, out: Path, **changed: object) -> list[str]:
    chosen = {"steps": 40, "save-every": 10, "eval-every": 20, "text": text, "out": out, **changed}
    flags = [f"--{name}" for name, value in chosen.items() if value is True]
    return [
        *MODEL.split(),
        *flags,
        *(str(part) for name, value in chosen.items() if value is not True for part in (f"--{name}", value)),
    ]


def job(given: list[str], fault: Callable[[int], None] | None = None, *, ranks: Ranks | None = None) -> Outcome:
    """The command in this process, among those of the group that it is in unless told."""
    if ranks is None:
        ranks = Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size(), torch.distributed.group.WORLD)
    command.joined = lambda: contextlib.nullcontext(ranks)
    sys.argv = ["pretrain", *given]
    out, err, code = io.StringIO(), io.StringIO(), 0
    if fault:
        fault(ranks.rank)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def at_step(step: int, act: Callable[[], None]) -> None:
    """Acts as that step's batch is drawn."""
    draw = run.batch

    def batch(prepared: Any, now: int) -> torch.Tensor:
        if now == step:
            act()
        return draw(prepared, now)

    run.batch = batch


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(folder: Path, other: Path) -> None:
    last = sorted((other / "checkpoints").glob("step-*"))[-1]
    files = [f"checkpoints/{last.name}/{path.name}" for path in last.iterdir()]
    for name in ("metrics.jsonl", "model.safetensors", *files):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name


# --- any number of processes


def test_the_run_is_the_same_on_any_number_of_processes(text: Path, tmp_path: Path):
    found = {}
    for size in (1, 2, 4):
        outcomes = in_ranks(size, job, arguments(text, tmp_path / str(size), json=True))
        assert [outcome.code for outcome in outcomes] == [0] * size, outcomes
        assert [bool(outcome.out + outcome.err) for outcome in outcomes] == [True] + [False] * (size - 1)
        found[size] = metrics(tmp_path / str(size)), json.loads(outcomes[0].out.splitlines()[-1])
    assert sum(line["switched"] for line in found[1][0]) > 100
    for size in (2, 4):
        lines, summary = found[size]
        for name in ("loss", "grad_norm"):
            numbers = [torch.tensor([line[name] for line in one]) for one in (lines, found[1][0])]
            torch.testing.assert_close(*numbers, rtol=1e-3, atol=0)
        assert [line["switched"] for line in lines] == [line["switched"] for line in found[1][0]]
        assert summary["validation_loss"] == pytest.approx(found[1][1]["validation_loss"], rel=1e-4)
        wire = {"factors": summary["bytes"]["factors"], "full_rank": summary["bytes"]["full_rank"]}
        wire |= dict.fromkeys(("bases", "gathered", "scattered", "switched"), 0)
        assert summary["wire_bytes_per_step"] == wire
        assert all(line["wire_bytes"] == wire for line in lines)
        share = summary["reduced_bytes_per_step"] / summary["full_rank_reduced_bytes_per_step"]
        assert share == pytest.approx(summary["trainable_share"])
        assert summary["processes"] == size


def test_compensation_reduces_dense_gradients(text: Path, tmp_path: Path):
    options = {"compensate": 0.1, "steps": 8, "eval-every": 8, "base-dtype": "int8"}
    found = {}
    for size, own in ((1, {}), (2, {}), (3, {"shard": True})):
        outcomes = in_ranks(size, job, arguments(text, tmp_path / str(size), **options, **own, json=True))
        assert [outcome.code for outcome in outcomes] == [0] * size, outcomes
        found[size] = metrics(tmp_path / str(size)), json.loads(outcomes[0].out.splitlines()[-1])
    for size in (2, 3):
        losses = [torch.tensor([line["loss"] for line in found[one][0]]) for one in (size, 1)]
        torch.testing.assert_close(*losses, rtol=1e-3, atol=0)
        summary = found[size][1]
        assert summary["reduced_bytes_per_step"] == summary["full_rank_reduced_bytes_per_step"]


# --- checkpoints


def test_saved_by_four_at_sigterm_and_resumed_by_one_to_four(text: Path, tmp_path: Path):
    """With sharded bases in int8 and sharded factors, so that what is saved in four parts is cut anew."""
    options = {"base-dtype": "int8", "shard": True, "shard-factors": True, "save-every": 100, "steps": 10}
    whole = in_ranks(4, job, arguments(text, tmp_path / "whole", **options))
    assert [outcome.code for outcome in whole] == [0] * 4, whole
    asked = in_ranks(4, job, arguments(text, tmp_path / "asked", **options), _ask_the_third)
    assert [outcome.code for outcome in asked] == [0] * 4, asked
    assert "asked to end, and saved: continue with --out" in asked[0].out.replace("\n", " ")
    (saved,) = (tmp_path / "asked" / "checkpoints").iterdir()
    assert saved.name == "step-00000007"
    for size in (4, 3, 2, 1):
        out = tmp_path / f"on-{size}"
        shutil.copytree(tmp_path / "asked", out)
        outcomes = in_ranks(size, job, arguments(text, out, **options, resume=True))
        assert [outcome.code for outcome in outcomes] == [0] * size, outcomes
        assert "continuing after step 7" in outcomes[0].out
        if size == 4:
            assert_same_run(out, tmp_path / "whole")
        losses = [torch.tensor([line["loss"] for line in metrics(one)]) for one in (out, tmp_path / "whole")]
        torch.testing.assert_close(*losses, rtol=2e-3, atol=0)


def _ask_the_third(rank: int) -> None:
    if rank == 2:
        at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM))


def test_one_process_saves_at_sigterm_and_goes_on_bit_for_bit(text: Path, tmp_path: Path):
    """Started by itself, without a group."""
    outcomes = in_ranks(1, _alone, text, tmp_path)[0]
    assert [outcome.code for outcome in outcomes] == [0, 0, 0], outcomes
    assert "continuing after step 15" in outcomes[2].out
    assert_same_run(tmp_path / "asked", tmp_path / "whole")


def _alone(text: Path, folder: Path) -> list[Outcome]:
    draw = run.batch
    outcomes = [job(arguments(text, folder / "whole"), ranks=ALONE)]
    at_step(12, lambda: os.kill(os.getpid(), signal.SIGTERM))
    outcomes.append(job(arguments(text, folder / "asked"), ranks=ALONE))
    run.batch = draw
    outcomes.append(job(arguments(text, folder / "asked", resume=True), ranks=ALONE))
    return outcomes


def test_a_damaged_shard_is_named_and_the_checkpoint_before_is_taken(text: Path, tmp_path: Path):
    given = arguments(text, tmp_path / "run", steps=20, keep=3, **{"save-every": 5})
    assert [outcome.code for outcome in in_ranks(4, job, given)] == [0] * 4
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["step-00000010", "step-00000015", "step-00000020"]
    # Nothing but safetensors and their checksums: no pickled object anywhere.
    for path in checkpoints:
        names = {f"state-{number:05d}-of-00004.safetensors" for number in range(1, 5)}
        assert {file.name for file in path.iterdir()} == {"SHA256SUMS", *names}
        assert all(load_file(path / name) for name in names)
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=path, check=True)
    damage_by_truncation(checkpoints[2] / "state-00003-of-00004.safetensors")
    damage_by_a_bit(checkpoints[1] / "state-00002-of-00004.safetensors")
    outcomes = in_ranks(4, job, [*given, "--resume"])
    assert [outcome.code for outcome in outcomes] == [0] * 4, outcomes
    out = " ".join(outcomes[0].out.split())
    assert "step-00000020: the checksum of state-00003-of-00004.safetensors does not match" in out
    assert "step-00000015: the checksum of state-00002-of-00004.safetensors does not match" in out
    assert "continuing after step 10" in out
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_a_full_disk_leaves_the_older_checkpoint_and_one_clear_error(text: Path, tmp_path: Path):
    assert [outcome.code for outcome in in_ranks(2, job, arguments(text, tmp_path / "whole"))] == [0, 0]
    _end_at_a_full_disk(text, tmp_path / "limited", tmp_path / "whole", _limit_the_second, "[Errno 27] File too large")
    checkpoints = tmp_path / "run" / "checkpoints"
    if not _can_mount(tmp_path):
        pytest.skip("a disk of its own, to be filled, takes the right to mount one")
    fill = partial(_fill_the_disk, checkpoints)
    try:
        _end_at_a_full_disk(text, tmp_path / "run", tmp_path / "whole", fill, "[Errno 28] No space left on device")
    finally:
        subprocess.run(["umount", checkpoints], check=False)


def _end_at_a_full_disk(text: Path, out: Path, whole: Path, fault: Callable[[int], None], reason: str) -> None:
    given = arguments(text, out, **{"save-every": 10})
    outcomes = in_ranks(2, job, given, fault)
    assert [outcome.code for outcome in outcomes] == [2, 2], outcomes
    assert outcomes[1].err == ""
    assert outcomes[0].err.count("\n") == 1
    assert f"the checkpoint of step 20 could not be written: {reason}" in outcomes[0].err
    (out / "checkpoints" / FILLER).unlink(missing_ok=True)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000010"]
    assert [outcome.code for outcome in in_ranks(2, job, [*given, "--resume"])] == [0, 0]
    assert_same_run(out, whole)


def _limit_the_second(rank: int) -> None:
    """No file may grow beyond that: the limit on a process that comes closest."""
    if rank == 1:
        at_step(15, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)))


FILLER = "filler"


def _mount(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder]
    return subprocess.run(command, check=False, capture_output=True).returncode


def _can_mount(folder: Path) -> bool:
    if shutil.which("mount") is None or _mount(folder / "mounted"):
        return False
    subprocess.run(["umount", folder / "mounted"], check=True)
    return True


def _fill_the_disk(folder: Path, rank: int) -> None:
    """A small one of their own for checkpoints."""
    if rank == 0:
        at_step(5, lambda: _mount(folder))
        at_step(15, lambda: _fill(folder / FILLER))


def _fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_holds_the_state_that_it_was_given(tmp_path: Path):
    """Not what a donated step has written over it in the meantime."""
    state = {"x": torch.arange(100_000.0), "count": torch.tensor(3), "half": torch.ones(2, 3, dtype=torch.bfloat16)}
    saver = Saver(tmp_path, ALONE, keep=2)
    expected = {name: leaf.clone() for name, leaf in state.items()}
    for step in (1, 2, 3):
        saver.start(step, state)
        for leaf in state.values():
            leaf.add_(1)
        saver.finish()
        loaded = load_checkpoint(tmp_path, state, ALONE)
        assert loaded is not None
        assert (loaded.step, loaded.refused) == (step, [])
        torch.testing.assert_close(loaded.state, expected, rtol=0, atol=0)
        expected = {name: leaf + 1 for name, leaf in expected.items()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    with pytest.raises(ValueError, match="it holds other tensors"):
        load_checkpoint(tmp_path, {"x": state["x"]}, ALONE)
    with pytest.raises(ValueError, match=r"\['x'\] is \(100000,\) torch.float32 instead of \(4,\) torch.float32"):
        load_checkpoint(tmp_path, {**state, "x": torch.zeros(4)}, ALONE)


# --- what one process alone does


def test_a_loss_that_is_not_finite_on_one_process_stops_all(text: Path, tmp_path: Path):
    outcomes = in_ranks(3, job, arguments(text, tmp_path / "run"), _spoil_the_loss_of_the_second)
    assert [outcome.code for outcome in outcomes] == [2, 2, 2], outcomes
    assert "`loss` must be finite to go on, got nan at step 14" in outcomes[0].err
    assert outcomes[1].err == outcomes[2].err == ""
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert all(leaf.isfinite().all() for path in saved.glob("*.safetensors") for leaf in load_file(path).values())


def _spoil_the_loss_of_the_second(rank: int) -> None:
    if rank == 1:
        loss = method.next_token_loss
        at_step(13, lambda: setattr(method, "next_token_loss", lambda *given: loss(*given) * torch.nan))


def test_a_process_that_drifts_is_named(text: Path, tmp_path: Path):
    outcomes = in_ranks(3, job, arguments(text, tmp_path / "run", **{"check-every": 5}), _let_the_third_drift)
    assert [outcome.code for outcome in outcomes] == [2, 2, 2], outcomes
    assert "`state` of processes [2] differs from the majority, first at [0].trainable[" in outcomes[0].err
    assert [line["step"] for line in metrics(tmp_path / "run")][-1] <= 15
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000010"]


def _let_the_third_drift(rank: int) -> None:
    if rank == 2:
        apply = dl.apply_updates

        def a_little_more(trainable: Any, updates: Any) -> Any:
            new = apply(trainable, updates)
            name = next(iter(new))
            return {**new, name: torch.nextafter(new[name], new[name] + 1)}

        at_step(11, lambda: setattr(dl, "apply_updates", a_little_more))


# --- kill -9


def test_killed_at_twenty_moments_it_ends_with_the_same_bits(text: Path, tmp_path: Path):
    """Processes that are started anew as `torchrun` does it, all of them whenever one was killed."""
    given = {"save-every": 4, "eval-every": 10, "steps": 20}
    since = time.monotonic()
    assert [outcome.code for outcome in in_ranks(2, job, arguments(text, tmp_path / "whole", **given))] == [0, 0]
    length, moments = time.monotonic() - since, random.Random(0)
    kills = runs = 0
    while kills < 20:
        out = tmp_path / f"killed-{runs}"
        kills += _kill_until_done(arguments(text, out, **given), moments, length)
        assert_same_run(out, tmp_path / "whole")
        runs += 1


def _kill_until_done(given: list[str], moments: random.Random, length: float) -> int:
    """The number of kills in a run that goes on after each from where the last checkpoint is."""
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
    assert [outcome.code for outcome in in_ranks(2, job, arguments(text, tmp_path / "whole", **given))] == [0, 0]
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


# --- bad input


def test_what_several_processes_cannot_do_is_one_line(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "run"
    for changed, message in (
        ({"batch-size": 1}, "`batch_size` must be at least the number of processes, 2, got 1"),
        ({"shard": True, "method": "full"}, "`shard` must come with frozen bases, got full, which has none"),
        ({"shard": True, "base-dtype": "nf4"}, "`params` in nf4 must have rows for 2 processes in whole runs of "),
        ({"compensate": 0.1, "shard": True, "shard-factors": True}, "`compensate` must be 0 with --shard-factors, got"),
        (
            {"optimizer": "muon", "shard": True, "shard-factors": True},
            "`optimizer` must be adamw with --shard-factors, got muon",
        ),
        ({"shard-factors": True}, "`shard_factors` must come with --shard, seeded candidates and float32 moments, got"),
        ({"resume": True}, "`out` must hold a run to resume"),
        ({"rank": 99}, "`rank` must be at least 1 and at most min(out, in) = 32"),
    ):
        outcomes = in_ranks(2, job, arguments(text, out, **changed))
        assert [outcome.code for outcome in outcomes] == [2, 2]
        assert message in outcomes[0].err
        assert outcomes[0].err.count("\n") == 1
        assert outcomes[1].err == ""
        assert not out.exists()
    monkeypatch.setattr(sys, "argv", ["pretrain", *arguments(text, out, shard=True)])
    with pytest.raises(SystemExit, match="2"):
        main()


def test_a_wrapped_model_is_refused_with_the_reason():
    in_ranks(1, _call_wrapped)


def _call_wrapped() -> None:
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard  # noqa: PLC0415
    from torch.nn.parallel import DistributedDataParallel  # noqa: PLC0415

    def fresh() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))

    mesh = init_device_mesh("cpu", (1,))
    params = dl.init(fresh(), rank=2, seed=0, targets=["*.weight"])
    inside = torch.nn.Sequential(DistributedDataParallel(fresh()[0]), fresh()[1])
    for model, message in (
        (DistributedDataParallel(fresh()), "got DistributedDataParallel"),
        (torch.nn.DataParallel(fresh()), "got DataParallel"),
        (fully_shard(fresh(), mesh=mesh), "got FSDPModule"),
        (FullyShardedDataParallel(fresh(), device_id=torch.device("cpu")), "got FullyShardedDataParallel"),
        (inside, "got DistributedDataParallel at '0'"),
    ):
        with pytest.raises(ValueError, match=f"`model` must be the module itself: a wrapper's hooks.*{message}"):
            dl.call(model, params, torch.ones(1, 4))
    assert dl.call(fresh(), params, torch.ones(1, 4)).shape == (1, 4)
