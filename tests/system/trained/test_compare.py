"""Two methods beside each other, by the command line."""

import json
from pathlib import Path

import pytest

from models.compare.__main__ import main
from models.compare.run import parse
from tests.support.command import outcome_of
from tests.support.pretrain import SMALL, metrics


@pytest.mark.slow
def test_both_methods_are_measured(lines: Path, tmp_path: Path):
    arguments = ["--text", lines, "--steps", 4, "--device", "cpu", *SMALL]
    outcome = outcome_of(main, "--out", tmp_path / "out", "--json", *arguments)
    assert outcome.code == 0, outcome.err
    record = json.loads(outcome.out.splitlines()[-1])
    assert record == json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert list(record) == ["full", "switchlora"]
    for method, row in record.items():
        assert row["method"] == method
        assert row["validation_loss"] == metrics(tmp_path / "out" / method)[-1]["validation_loss"]
        assert row["peak_bytes"] > 5e7
    assert record["switchlora"]["bytes"]["optimizer"] < record["full"]["bytes"]["optimizer"]
    table = outcome.out.splitlines()
    assert any("validation loss" in line and f"{record['full']['validation_loss']:.4f}" in line for line in table)


def test_other_options_are_passed_on():
    options = parse(["--methods", "lora", "full", "--steps", "3", "--lr=0.1", "--compile"])
    assert options.methods == ["lora", "full"]
    assert options.of_training == ["--steps", "3", "--lr=0.1", "--compile"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "full"], "`--method` is set by this program; use --methods"),
        (["--processes", "0"], "`processes` must be at least 1, got 0"),
        (["--methods", "full", "full"], "`methods` must differ, got full full"),
        (["--steps", "0"], "`steps` must be at least 1, got 0"),
        (["--compensate", "0.1"], "`compensate` must be 0 for full, got 0.1"),
        (["--methods", "lora", "full", "--base-dtype", "int8"], "`base_dtype` must be float32 for full, got int8"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_trained(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    outcome = outcome_of(main, *arguments)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert message in outcome.err
    assert not list(tmp_path.iterdir())
