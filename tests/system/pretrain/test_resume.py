"""The main job continues from its checkpoints, also from those before a damaged one."""

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save

from dynlora_fn.interop._checksums import join_sums, record_sum
from models import corpus
from models.pretrain.processes import SINGLE_PROCESS
from models.pretrain.run import perplexity
from tests.support.damage import damage_by_a_bit, damage_by_truncation
from tests.support.pretrain import SMALL, Job, Outcome, contents, metrics
from tests.support.pretrain_processes import job as run_job
from tests.support.processes import in_processes, started


def _train(*arguments: object) -> Outcome:
    """Run the command without a group, in a process that has imported what it needs."""
    return run_job([*SMALL, *map(str, arguments)], processes=SINGLE_PROCESS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", ["--candidates seeded", "--candidates pool", "--base-dtype int8 --residual int8 --moments 8bit"]
)
def test_killed_run_continues_bit_for_bit(tmp_path: Path, text: Path, options: str):
    arguments = ["--text", text, "--steps", 60, "--save-every", 10, "--eval-every", 20, *options.split()]
    killed = [*arguments, "--out", tmp_path / "killed"]
    (uninterrupted,) = in_processes(1, _train, *arguments, "--out", tmp_path / "whole")
    lines = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    with started(1, _train, *killed) as ([process], _):
        while not (lines.exists() and lines.read_bytes().count(b"\n") >= 25) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(metrics(tmp_path / "killed")) < 60, "the run ended before it was killed"
    (resumed,) = in_processes(1, _train, *killed, "--resume")
    assert [uninterrupted.code, resumed.code] == [0, 0], (uninterrupted, resumed)
    assert "continuing after step 0" not in resumed.out + resumed.err
    for name in ("metrics.jsonl", "model.safetensors", "checkpoints/step-00000060/state.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [damage_by_truncation, damage_by_a_bit, remove])
def test_damaged_checkpoint_is_refused_and_the_older_one_used(job: Job, tmp_path: Path, damage: Callable[[Path], None]):
    arguments = ["--out", tmp_path / "run", "--steps", 20, "--save-every", 10]
    job(*arguments)
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    damage(tmp_path / "run" / "checkpoints" / "step-00000020" / "state.safetensors")
    outcome = job(*arguments, "--resume")
    assert outcome.code == 0, outcome.err
    assert "refused a damaged checkpoint" in outcome.out
    assert "step-00000020" in outcome.out
    assert "continuing after step 10" in outcome.out
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_damaged_checkpoints_only(job: Job, tmp_path: Path):
    arguments = ["--out", tmp_path / "run", "--steps", 20, "--save-every", 10]
    job(*arguments)
    for path in (tmp_path / "run").rglob("state.safetensors"):
        damage_by_a_bit(path)
    before = contents(tmp_path / "run")
    outcome = job(*arguments, "--resume")
    assert outcome.code == 2
    assert "step-00000010" in outcome.err
    assert "step-00000020" in outcome.err
    assert contents(tmp_path / "run") == before


def test_resume_with_another_configuration_says_in_what(job: Job, tmp_path: Path, text: Path):
    job("--out", tmp_path / "run", "--steps", 2)
    before = contents(tmp_path / "run")
    outcome = job("--out", tmp_path / "run", "--steps", 3, "--lr", 0.5, "--resume")
    assert outcome.code == 2
    assert "lr was None and is 0.5" in outcome.err
    (text / "0.txt").write_text("something else altogether\n" * 50)
    assert "corpus was" in job("--out", tmp_path / "run", "--steps", 2, "--resume").err
    assert contents(tmp_path / "run") == before


def test_a_resumed_run_uses_the_tokens_of_before(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "run"
    job("--out", out, "--steps", 4, "--save-every", 2)
    before, inode = contents(out), (out / "tokens" / "train.bin").stat().st_ino
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    monkeypatch.setattr(corpus, "tokenize", None)
    outcome = job("--out", out, "--steps", 4, "--resume")
    assert outcome.code == 0, outcome.err
    assert (out / "tokens" / "train.bin").stat().st_ino == inode
    after = contents(out)
    for name in before.keys() - {"summary.json", "loss.png"}:
        assert after[name] == before[name], name


@pytest.mark.parametrize("damage", [damage_by_truncation, damage_by_a_bit, remove])
@pytest.mark.parametrize("file", ["train.bin", "encoding.json"])
def test_a_resumed_run_encodes_damaged_tokens_again(
    job: Job, tmp_path: Path, damage: Callable[[Path], None], file: str
):
    out = tmp_path / "run"
    job("--out", out, "--steps", 2)
    before = contents(out)
    damage(out / "tokens" / file)
    outcome = job("--out", out, "--steps", 2, "--resume")
    assert outcome.code == 0, outcome.err
    after = contents(out)
    assert after["tokens/train.bin"] == before["tokens/train.bin"]
    assert after["metrics.jsonl"] == before["metrics.jsonl"]
    assert after["tokens/encoding.json"] == before["tokens/encoding.json"]


def test_divergence_stops_and_keeps_the_last_good_checkpoint(job: Job, tmp_path: Path):
    out = tmp_path / "run"
    high = ["--optimizer", "adamw", "--lr", "1e18", "--warmup", "40"]
    outcome = job("--out", out, "--steps", 60, "--save-every", 1, *high)
    assert outcome.code == 2
    assert "must be finite to go on, got" in outcome.err
    assert "and the same steps would follow; start a new run with a lower --lr" in outcome.err
    assert "--resume" not in outcome.err
    assert "Traceback" not in outcome.err
    saved = sorted((out / "checkpoints").glob("step-*/state.safetensors"))
    assert saved
    assert all(tensor.isfinite().all() for tensor in load_file(saved[-1]).values())
    assert all(line["loss"] < float("inf") for line in metrics(out))


# As written by the version before options were grouped.
FLAT_RECORD = """
{"method": "switchlora", "model": "llama-tiny", "rank": 8, "targets": [], "candidates": "seeded", "text": null,
"dataset": null, "dataset_config": null, "text_column": "text", "dataset_characters": 200000000, "tokenizer": null,
"steps": 20, "batch_size": 2, "seq_len": 32, "grad_accum": 1, "lr": null, "dense_lr": null, "warmup": 4,
"optimizer": null, "weight_decay": 0.0, "clip": 1.0, "interval": 10.0, "ratio": 1.0, "freeze": 5, "compensate": 0.0,
"merge_every": 100, "base_dtype": "float32", "residual": "bfloat16", "residual_device": null, "shard": false,
"shard_factors": false, "moments": "float32", "compute_dtype": "float32", "device": null, "compile": false, "seed": 0,
"eval_every": 100, "eval_batches": 2, "save_every": 10, "corpus": null}
"""


def test_a_run_with_a_flat_record_of_its_options_resumes(job: Job, tmp_path: Path):
    arguments = ["--out", tmp_path / "run", "--steps", 20, "--save-every", 10]
    job(*arguments, "--trained", "both")
    path = tmp_path / "run" / "config.json"
    record, flat = json.loads(path.read_text()), json.loads(FLAT_RECORD)
    flat |= {name: record[name] for name in ("text", "device", "corpus")}  # those of this machine
    path.write_text(json.dumps(flat))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000020")
    outcome = job(*arguments, "--resume")
    assert outcome.code == 0, outcome.err
    assert "continuing after step 10" in outcome.out
    since = {"validation": [], "keep": 2, "check_every": 100, "sample_every": 0, "tensorboard": False}
    since |= {"dense_optimizer": "adamw", "trained": "both"}
    assert record == flat | since


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_checkpoint_whose_optimizer_states_have_their_older_names_resumes(job: Job, tmp_path: Path, optimizer: str):
    """They had no `FreezeState` around them: ``.opt_state['rest'].mu`` is now ``.opt_state['rest'].inner.mu``."""
    arguments = ["--out", tmp_path / "run", "--steps", 20, "--save-every", 10, "--optimizer", optimizer]
    arguments += ["--trained", "both"]
    job(*arguments)
    folders = [tmp_path / "run" / "checkpoints" / f"step-{step:08d}" for step in (10, 20)]
    wanted = (folders[1] / "state.safetensors").read_bytes()
    shutil.rmtree(folders[1])
    path = folders[0] / "state.safetensors"
    tensors = {name.replace("'].inner.", "']."): leaf for name, leaf in load_file(path).items()}
    assert any(".opt_state['rest'].mu['" in name for name in tensors)
    offsets = {name: {"saved_offsets": [0] * leaf.ndim} for name, leaf in tensors.items()}
    path.write_bytes(save(tensors, metadata={"DCP_SHARDING_INFO": json.dumps(offsets)}))
    record_sum(path)
    join_sums(folders[0])
    outcome = job(*arguments, "--resume")
    assert outcome.code == 0, outcome.err
    assert "continuing after step 10" in outcome.out
    assert (folders[1] / "state.safetensors").read_bytes() == wanted


STEPS = ["--steps", 20, "--save-every", 5, "--keep", 9]


def test_copies_of_checkpoints_are_left_alone(job: Job, tmp_path: Path):
    out, copies = tmp_path / "run", ("step-best", "step-last", "step-00000010.bak")
    job("--out", out, *STEPS)
    before = (out / "model.safetensors").read_bytes()
    for name in copies:
        shutil.copytree(out / "checkpoints" / "step-00000010", out / "checkpoints" / name)
    for step in (15, 20):
        shutil.rmtree(out / "checkpoints" / f"step-{step:08d}")
    outcome = job("--out", out, *STEPS[:-1], 1, "--resume")
    assert outcome.code == 0, outcome.err
    assert "continuing after step 10" in outcome.out
    assert (out / "model.safetensors").read_bytes() == before
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"step-00000020", *copies}


def test_a_checkpoint_of_another_step_or_run_is_refused_and_the_older_one_used(job: Job, tmp_path: Path):
    out = tmp_path / "run"
    job("--out", out, *STEPS)
    job("--out", tmp_path / "other", *STEPS, "--seed", 1)
    before = (out / "model.safetensors").read_bytes()
    checkpoints = out / "checkpoints"
    shutil.rmtree(checkpoints / "step-00000020")
    shutil.copytree(checkpoints / "step-00000005", checkpoints / "step-00000017")
    shutil.rmtree(checkpoints / "step-00000015")
    shutil.copytree(tmp_path / "other" / "checkpoints" / "step-00000015", checkpoints / "step-00000015")
    outcome = job("--out", out, *STEPS, "--resume")
    assert outcome.code == 0, outcome.err
    out_text = " ".join(outcome.out.split())
    assert "refused a checkpoint: " in out_text
    assert "step-00000017: it is of step 5, but its name has another step" in out_text
    assert "step-00000015: it has the setting seed 1 instead of 0" in out_text
    assert "continuing after step 10" in out_text
    assert (out / "model.safetensors").read_bytes() == before


def cut(path: Path) -> None:
    path.write_bytes(b"\n".join(path.read_bytes().split(b"\n")[:3]) + b"\n")


def without_loss(path: Path) -> None:
    path.write_text(path.read_text().replace('"loss"', '"lost"'))


def without_validation(path: Path) -> None:
    path.write_text(path.read_text().replace('"validation_loss"', '"lost"'))


def into_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [remove, cut, without_loss, without_validation, into_pipe])
def test_metrics_that_the_end_of_a_run_needs_are_checked_before_it_trains(
    job: Job, tmp_path: Path, damage: Callable[[Path], None]
):
    arguments = ["--out", tmp_path / "run", "--steps", 10, "--save-every", 5]
    job(*arguments)
    damage(tmp_path / "run" / "metrics.jsonl")
    before = contents(tmp_path / "run")
    outcome = job(*arguments, "--resume")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "metrics must " in outcome.err
    assert "metrics.jsonl" in outcome.err
    assert contents(tmp_path / "run") == before


def test_perplexity_of_a_large_loss_is_infinite():
    assert [perplexity(loss) for loss in (0.0, 709.0, 710.0, math.inf)] == [1.0, math.exp(709.0), math.inf, math.inf]
    assert math.isnan(perplexity(math.nan))
