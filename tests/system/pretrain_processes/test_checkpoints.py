"""Checkpoints of several processes: saved at a signal, damaged, and resumed by any number."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.pretrain import run
from models.pretrain.checkpoint import Saver, load_checkpoint
from models.pretrain.processes import SINGLE_PROCESS
from tests.support.damage import damage_by_a_bit, damage_by_truncation
from tests.support.pretrain import Outcome, metrics
from tests.support.pretrain_processes import arguments, assert_same_run, at_step, job
from tests.support.processes import in_processes


def test_saved_by_four_at_sigterm_and_resumed_by_one_to_four(text: Path, tmp_path: Path):
    """Bases in int8 and factors are sharded, so that a resumed run must shard four saved parts again."""
    options = {"base-dtype": "int8", "shard": True, "shard-factors": True, "save-every": 100, "steps": 10}
    uninterrupted = in_processes(4, job, arguments(text, tmp_path / "whole", **options))
    assert [outcome.code for outcome in uninterrupted] == [0] * 4, uninterrupted
    asked = in_processes(4, job, arguments(text, tmp_path / "requested", **options), _ask_the_third)
    assert [outcome.code for outcome in asked] == [0] * 4, asked
    message = (
        "stopped by SIGTERM after a checkpoint of step 7: continue with torchrun --nproc-per-node 4 -m models.pretrain"
    )
    assert message in asked[0].out.replace("\n", " ")
    (saved,) = (tmp_path / "requested" / "checkpoints").iterdir()
    assert saved.name == "step-00000007"
    for size in (4, 3, 2, 1):
        out = tmp_path / f"on-{size}"
        shutil.copytree(tmp_path / "requested", out)
        outcomes = in_processes(size, job, arguments(text, out, **options, resume=True))
        assert [outcome.code for outcome in outcomes] == [0] * size, outcomes
        assert "continuing after step 7" in outcomes[0].out
        if size == 4:
            assert_same_run(out, tmp_path / "whole")
        losses = [torch.tensor([line["loss"] for line in metrics(folder)]) for folder in (out, tmp_path / "whole")]
        torch.testing.assert_close(*losses, rtol=2e-3, atol=0)


def _ask_the_third(process: int) -> None:
    if process == 2:
        at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM))


@pytest.mark.slow
def test_one_process_saves_at_sigterm_and_goes_on_bit_for_bit(text: Path, tmp_path: Path):
    """The process runs without a group."""
    outcomes = in_processes(1, _alone, text, tmp_path)[0]
    assert [outcome.code for outcome in outcomes] == [0, 0, 0], outcomes
    assert "continuing after step 15" in outcomes[2].out
    assert_same_run(tmp_path / "requested", tmp_path / "whole")


def _alone(text: Path, folder: Path) -> list[Outcome]:
    draw = run.batch
    outcomes = [job(arguments(text, folder / "whole"), processes=SINGLE_PROCESS)]
    at_step(12, lambda: os.kill(os.getpid(), signal.SIGTERM))
    outcomes.append(job(arguments(text, folder / "requested"), processes=SINGLE_PROCESS))
    run.batch = draw
    outcomes.append(job(arguments(text, folder / "requested", resume=True), processes=SINGLE_PROCESS))
    return outcomes


def test_a_damaged_shard_is_named_and_the_checkpoint_before_is_taken(text: Path, tmp_path: Path):
    given = arguments(text, tmp_path / "run", steps=20, keep=3, **{"save-every": 5})
    assert [outcome.code for outcome in in_processes(4, job, given)] == [0] * 4
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["step-00000010", "step-00000015", "step-00000020"]
    # Nothing but safetensors and their checksums: no pickled object anywhere.
    for path in checkpoints:
        names = {f"state-{shard:05d}-of-00004.safetensors" for shard in range(1, 5)}
        assert {file.name for file in path.iterdir()} == {"SHA256SUMS", *names}
        assert all(load_file(path / name) for name in names)
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=path, check=True)
    damage_by_truncation(checkpoints[2] / "state-00003-of-00004.safetensors")
    damage_by_a_bit(checkpoints[1] / "state-00002-of-00004.safetensors")
    outcomes = in_processes(4, job, [*given, "--resume"])
    assert [outcome.code for outcome in outcomes] == [0] * 4, outcomes
    out = " ".join(outcomes[0].out.split())
    assert "step-00000020: the checksum of state-00003-of-00004.safetensors does not match" in out
    assert "step-00000015: the checksum of state-00002-of-00004.safetensors does not match" in out
    assert "continuing after step 10" in out
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_a_checkpoint_holds_the_state_that_it_was_given(tmp_path: Path):
    """The checkpoint has the values at the time of saving, not those that a later donated step wrote."""
    state = {"x": torch.arange(100_000.0), "count": torch.tensor(3), "half": torch.ones(2, 3, dtype=torch.bfloat16)}
    saver = Saver(tmp_path, SINGLE_PROCESS, keep=2)
    expected = {name: leaf.clone() for name, leaf in state.items()}
    for step in (1, 2, 3):
        saver.start(step, state)
        for leaf in state.values():
            leaf.add_(1)
        saver.finish()
        loaded = load_checkpoint(tmp_path, state, SINGLE_PROCESS)
        assert loaded is not None
        assert (loaded.step, loaded.refused) == (step, [])
        torch.testing.assert_close(loaded.state, expected, rtol=0, atol=0)
        expected = {name: leaf + 1 for name, leaf in expected.items()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    with pytest.raises(ValueError, match="it contains other tensors"):
        load_checkpoint(tmp_path, {"x": state["x"]}, SINGLE_PROCESS)
    with pytest.raises(ValueError, match=r"\['x'\] is \(100000,\) torch.float32 instead of \(4,\) torch.float32"):
        load_checkpoint(tmp_path, {**state, "x": torch.zeros(4)}, SINGLE_PROCESS)


def test_a_donated_template_is_the_memory_of_the_state(tmp_path: Path):
    """Tensors that share memory are copied before they are read."""
    values = {"x": torch.arange(24.0).reshape(4, 6), "y": torch.ones(4, 6), "t": torch.tensor(3), "z": torch.ones(2, 3)}
    assert load_checkpoint(tmp_path, values, SINGLE_PROCESS, donate=True) is None
    with Saver(tmp_path, SINGLE_PROCESS, keep=1) as saver:
        saver.start(1, values)
    zeros = torch.zeros(4, 6)
    template = {"x": zeros, "y": zeros, "t": torch.tensor(0), "z": torch.zeros(3).expand(2, 3)}
    loaded = load_checkpoint(tmp_path, template, SINGLE_PROCESS, donate=True)
    assert loaded is not None
    torch.testing.assert_close(loaded.state, values, rtol=0, atol=0)
    assert loaded.state["x"].data_ptr() == zeros.data_ptr()
    assert loaded.state["t"].data_ptr() == template["t"].data_ptr()
