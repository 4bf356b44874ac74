"""A run compiles where that wins back its time, and makes the same choice each time."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from models.pretrain import compiling
from models.pretrain.config import Config, Machine
from tests.support.pretrain import Job

CPU = replace(Config(), machine=Machine(device="cpu"))
PARAMETERS = 869_504  # of the default model


@pytest.mark.parametrize(
    ("steps", "world_size", "compiles"), [(400, 1, False), (20_000, 1, True), (20_000, 16, False), (100_000, 16, True)]
)
def test_a_cpu_compiles_a_long_run(monkeypatch: pytest.MonkeyPatch, steps: int, world_size: int, compiles: bool):
    config = replace(CPU, training=replace(CPU.training, steps=steps))
    monkeypatch.setattr(compiling.shutil, "which", lambda _: "/usr/bin/c++")
    assert compiling.with_choice(config, PARAMETERS, world_size).machine.compile == compiles
    assert not compiling.with_choice(
        replace(config, machine=Machine(device="cpu", eager=True)), PARAMETERS, 1
    ).machine.compile
    monkeypatch.setattr(compiling.shutil, "which", lambda _: None)
    assert not compiling.with_choice(config, PARAMETERS, world_size).machine.compile


def test_the_choice_is_said_and_recorded(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiling, "_FLOPS_PER_SECOND", 1.0)  # so that every run is long
    monkeypatch.setattr(compiling.shutil, "which", lambda _: "/usr/bin/c++")
    monkeypatch.setattr("dynlora_fn.compile_step", lambda step: step)
    arguments = ["--out", tmp_path / "run", "--steps", 2, "--device", "cpu", "--no-eager"]
    outcome = job(*arguments)
    assert outcome.code == 0, outcome.err
    assert "the step is compiled: minutes the first time" in outcome.out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["compile"] is True
    monkeypatch.setattr(compiling, "_FLOPS_PER_SECOND", 1e18)
    assert job(*arguments, "--resume").code == 0  # with the choice of before
    outcome = job("--out", tmp_path / "short", "--steps", 2, "--device", "cpu", "--no-eager")
    assert "the step is not compiled: that takes about 180 s and would save about 0 s" in outcome.out


def test_both_choices_are_refused(job: Job):
    outcome = job("--compile", "--eager")
    assert outcome.code == 2
    assert "`compile` and `eager` must not both be given" in outcome.err
