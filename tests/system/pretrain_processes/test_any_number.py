"""The main job is the same run on any number of processes."""

import json
from pathlib import Path

import pytest
import torch

from models.trained import open_trained
from tests.support.pretrain import metrics
from tests.support.pretrain_processes import arguments, job
from tests.support.processes import in_processes


def test_the_run_is_the_same_on_any_number_of_processes(text: Path, tmp_path: Path):
    found = {}
    for size in (1, 2, 4):
        outcomes = in_processes(size, job, arguments(text, tmp_path / str(size), json=True))
        assert [outcome.code for outcome in outcomes] == [0] * size, outcomes
        assert [bool(outcome.out + outcome.err) for outcome in outcomes] == [True] + [False] * (size - 1)
        found[size] = metrics(tmp_path / str(size)), json.loads(outcomes[0].out.splitlines()[-1])
    assert sum(line["switched"] for line in found[1][0]) > 100
    for size in (2, 4):
        lines, summary = found[size]
        for name in ("loss", "grad_norm"):
            values = [torch.tensor([line[name] for line in run]) for run in (lines, found[1][0])]
            torch.testing.assert_close(*values, rtol=1e-3, atol=0)
        assert [line["switched"] for line in lines] == [line["switched"] for line in found[1][0]]
        assert summary["validation_loss"] == pytest.approx(found[1][1]["validation_loss"], rel=1e-4)
        full_rank = summary["bytes"]["full_rank"]
        wire = {"factors": 4 * summary["trainable"] - full_rank, "full_rank": full_rank}
        wire |= dict.fromkeys(("bases", "gathered", "scattered", "switched"), 0)
        assert summary["wire_bytes_per_step"] == wire
        assert all(line["wire_bytes"] == wire for line in lines)
        share = summary["reduced_bytes_per_step"] / summary["full_rank_reduced_bytes_per_step"]
        assert share == pytest.approx(summary["trainable_share"])
        assert summary["processes"] == size


def test_compensation_reduces_dense_gradients(text: Path, tmp_path: Path):
    options = {"compensate": 0.1, "steps": 8, "eval-every": 8, "base-dtype": "int8"}
    found = {}
    for size, sharding in ((1, {}), (2, {}), (3, {"shard": True})):
        outcomes = in_processes(size, job, arguments(text, tmp_path / str(size), **options, **sharding, json=True))
        assert [outcome.code for outcome in outcomes] == [0] * size, outcomes
        found[size] = metrics(tmp_path / str(size)), json.loads(outcomes[0].out.splitlines()[-1])
    for size in (2, 3):
        losses = [torch.tensor([line["loss"] for line in found[processes][0]]) for processes in (size, 1)]
        torch.testing.assert_close(*losses, rtol=1e-3, atol=0)
        summary = found[size][1]
        assert summary["reduced_bytes_per_step"] == summary["full_rank_reduced_bytes_per_step"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"optimizer": "muon"}, {"optimizer": "adamw", "moments": "8bit"}], ids=["muon", "8bit"]
)
def test_sharded_factors_have_every_optimizer(text: Path, tmp_path: Path, options: dict):
    options = options | {"steps": 12, "eval-every": 12, "json": True, "lr": 0.01, "trained": "both"}
    found = {}
    for size, sharding in ((1, {}), (2, {"shard": True, "shard-factors": True})):
        outcomes = in_processes(size, job, arguments(text, tmp_path / str(size), **options, **sharding))
        assert [outcome.code for outcome in outcomes] == [0] * size, outcomes
        found[size] = metrics(tmp_path / str(size)), json.loads(outcomes[0].out.splitlines()[-1])
    losses = [torch.tensor([line["loss"] for line in found[size][0]]) for size in (1, 2)]
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)
    # Muon all-reduces four (8, 8) matrices of each of 7 weights in 2 layers.
    wanted = 4 * 2 * 7 * 4 * 64 if options["optimizer"] == "muon" else 0
    assert found[2][1]["wire_bytes_per_step"]["factors"] == wanted
    _assert_read_by_one_process(tmp_path / "2")


def _assert_read_by_one_process(run: Path) -> None:
    paths = (run, run / "checkpoints" / "step-00000012")
    final, restored = (open_trained(path, torch.device("cpu")).model.state_dict() for path in paths)
    assert all(torch.equal(final[name], restored[name]) for name in final)
