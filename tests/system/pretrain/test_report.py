"""What the main job prints and draws: the banner, lines, sizes and times, the plot, and TensorBoard's scalars."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from models.pretrain import progress, recorder
from models.pretrain.plot import compared_runs, smoothed, validation_points
from models.pretrain.progress import duration, read_start
from models.pretrain.report import size
from tests.support.pretrain import Job, metrics


def test_the_banner_says_what_will_be_trained(job: Job, tmp_path: Path):
    outcome = job("--out", tmp_path / "run", "--steps", 20)
    words = " ".join(outcome.out.split())
    for part in (
        "kB, 6 documents to train on, 1 document for validation",
        "(5.0%) for validation, bytes",
        "steps 20 of 64 tokens: 1,280 tokens, 0.22 passes over the text",
        "model llama-tiny: 41,632 parameters, 21,920 trained (52.7%)",
        "method switchlora, rank 8, only b trained, 14 low-rank weights, bases in float32",
        "optimizer muon, rate 0.002; embedding, head and norms adamw, rate 0.032; 4 steps of warm-up",
        "vectors in all",
    ):
        assert part in words
    assert "warning" not in words
    before = read_start(tmp_path / "run" / "start.json")
    assert before == pytest.approx(math.log(256), rel=0.05)
    assert f"validation loss before the first step {before:.3f} ({before / math.log(2):.3f} bits/byte)" in words
    assert words.index("validation loss before the first step") < words.index("step 20: loss")


def test_a_run_that_switches_nothing_warns(job: Job, tmp_path: Path):
    outcome = job("--out", tmp_path / "run", "--steps", 2, "--method", "relora")
    assert "warning: 0 vectors are switched in all; use a smaller --merge-every" in " ".join(outcome.out.split())


def test_lines_come_by_time_without_a_terminal(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setattr(recorder, "_FLUSH_SECONDS", 1e6)
    outcome = job("--out", tmp_path / "run", "--steps", 30)
    steps = [line.split(":")[0] for line in outcome.out.splitlines() if line.startswith("step ")]
    assert steps == ["step 1", "step 11", "step 21", "step 30"]


def test_the_closing_table_has_the_loss_first_and_only_rows_that_apply(job: Job, tmp_path: Path):
    outcome = job("--out", tmp_path / "run", "--steps", 2, "--method", "full")
    table = outcome.out[outcome.out.index("llama-tiny, full, 2 steps") :]
    assert table.index("validation loss") < table.index("trainable parameters")
    assert "computed" in table
    for absent in ("residuals", "candidates", "factors", "reduced per step", "switched", "drift", " bytes"):
        assert absent not in table


def test_units():
    assert [size(count) for count in (0, 999, 1000, 123_456, 5e9, 7e15)] == [
        *("0 bytes", "999 bytes", "1 kB", "123 kB", "5 GB", "7e+03 TB")
    ]
    assert [duration(seconds) for seconds in (0.4, 59.4, 60, 200, 3000, 5000, 200_000)] == [
        *("0 s", "59 s", "1 min", "3 min 20 s", "50 min", "1 h 23 min", "2 d 7 h")
    ]


def test_a_smoothed_line_is_a_running_mean():
    assert smoothed([3.0]) == [3.0]
    assert smoothed([1.0, 2.0, 6.0]) == [1.5, 3.0, 4.0]
    assert smoothed([5.0] * 400) == [5.0] * 400


def test_validation_points_start_before_the_first_step():
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "validation_loss": 1.0}, {"step": 4, "validation_loss": math.inf}]
    assert validation_points(lines, 3.0) == [(0, 3.0), (2, 1.0)]
    assert validation_points(lines, None) == [(2, 1.0)]


def test_runs_are_compared_in_the_plot(job: Job, tmp_path: Path):
    assert job("--out", tmp_path / "one", "--steps", 4).code == 0
    outcome = job("--out", tmp_path / "two", "--steps", 2, "--compare", tmp_path / "one")
    assert outcome.code == 0, outcome.err
    (points,) = compared_runs([tmp_path / "one"]).values()
    assert [step for step, _ in points] == [0, 4]
    refused = job("--out", tmp_path / "three", "--compare", tmp_path)
    assert refused.code == 2
    assert "`compare` must name folders of runs with validation losses, got" in refused.err
    assert not (tmp_path / "three").exists()


def test_tensorboard_gets_the_lines_of_the_metrics(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scalars: list[Any] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int):
            scalars.append((folder, purge_step))

        def add_scalar(self, *scalar: Any) -> None:
            scalars.append(scalar)

        def flush(self) -> None:
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    assert job("--out", tmp_path / "run", "--steps", 3, "--tensorboard").code == 0
    assert scalars[0] == (str(tmp_path / "run" / "tensorboard"), 1)
    assert [scalar for scalar in scalars if scalar[0] == "loss"] == [
        ("loss", line["loss"], line["step"]) for line in metrics(tmp_path / "run")
    ]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    outcome = job("--out", tmp_path / "other", "--tensorboard")
    assert outcome.code == 2
    assert "`tensorboard` needs the extra `tensorboard`: pip install 'dynlora-fn[tensorboard]'" in outcome.err
