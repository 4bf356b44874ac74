"""The main job refuses bad input in one line and writes nothing."""

from pathlib import Path

import pytest

from models.pretrain.reading import tokens_beside
from tests.support.pretrain import Job, contents

BAD_INPUT = {
    "rank": (["--rank", "33"], "`rank` is 33 for 'layers.0.attention.query.weight' of shape (32, 32)"),
    "targets": (["--targets", "blocks.*"], "`targets` contains 'blocks.*', which matches no name"),
    "device": (["--device", "cuda:9"], "`device` must be one that this machine has, got 'cuda:9'"),
    "a device without values": (
        ["--device", "meta"],
        "`device` must be one that this machine has, got 'meta': it has no",
    ),
    "residuals without values": (["--residual-device", "meta"], "`residual_device` must be one that this machine has"),
    "no such device": (["--device", "toaster"], "`device` must be one that this machine has, got 'toaster'"),
    "model": (["--model", "llama-2m"], "`model` must be one of"),
    "steps": (["--steps", "0"], "`steps` must be at least 1, got 0"),
    "seed": (["--seed", str(2**63)], "`seed` must be less than 2**63, got 9223372036854775808"),
    "weight decay": (["--weight-decay", "inf"], "`weight_decay` must be finite, got inf"),
    "lr": (["--lr", "nan"], "`lr` must be positive and finite, got nan"),
    "interval": (["--interval", "9"], "`interval` must be at least 10"),
    "short text": (["--seq-len", "4000"], "the text must give at least 4001 tokens for"),
    "no text": (["--text", "nowhere"], "`text` must name files or folders, got 'nowhere'"),
    "pool": (["--candidates", "pool", "--method", "lora"], "`candidates` must be 'seeded' except for switchlora"),
    "compensate": (["--compensate", "0.1", "--method", "full"], "`compensate` must be 0 for full"),
    "one side": (["--trained", "b", "--method", "full"], "`trained` must be 'both' for full"),
    "one side of a pool": (["--trained", "b", "--candidates", "pool"], "`candidates` must be 'seeded' with --trained"),
    "resume": (["--out", "nowhere", "--resume"], "`out` must contain a run to resume, got 'nowhere'"),
    "both": (["--dataset", "c4"], "`text` and `dataset` must not both be given"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_and_writes_nothing(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    arguments, message = BAD_INPUT[name]
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    outcome = job(*arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert "Traceback" not in outcome.err
    assert contents(tmp_path) == before


def test_unknown_option(job: Job):
    outcome = job("--method", "sorcery")
    assert outcome.code == 2
    assert "sorcery" in outcome.err + outcome.out


def test_folder_of_another_run_is_left_alone(job: Job, tmp_path: Path):
    job("--out", tmp_path / "run", "--steps", 2)
    before = contents(tmp_path / "run")
    outcome = job("--out", tmp_path / "run", "--steps", 2)
    assert outcome.code == 2
    assert "`out` must be new or empty, or come with --resume" in outcome.err
    assert contents(tmp_path / "run") == before


def test_tokens_are_encoded_inside_of_a_folder_that_exists(job: Job, tmp_path: Path):
    """The folder above it may be on another disk, or not writable."""
    (tmp_path / "run" / ".encoding").mkdir(parents=True)  # of a killed run
    with tokens_beside(tmp_path / "run") as folder:
        assert folder.parent == tmp_path / "run"
    outcome = job("--out", tmp_path / "run", "--steps", 1)
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "run" / "tokens" / "train.bin").is_file()
    assert not (tmp_path / "run" / ".encoding").exists()


def test_a_model_that_cannot_be_written_is_reported_in_one_line(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise ValueError("the configuration is invalid")

    monkeypatch.setattr("models.pretrain.prepared.save_pretrained", fail)
    outcome = job("--out", tmp_path / "run", "--steps", 2)
    assert outcome.code == 2
    assert outcome.err.startswith("error: the model could not be written: the configuration is invalid; the last ")
    assert "checkpoint is step 2; continue with" in outcome.err


def test_names_are_printed_as_they_are(job: Job, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    text.rename(":100: [red]")
    outcome = job("--text", ":100: [red]", "--out", "[bold]", "--steps", 1)
    assert outcome.code == 0, outcome.err
    assert ":100: [red]: " in outcome.out
    assert "[bold]: " in outcome.out
