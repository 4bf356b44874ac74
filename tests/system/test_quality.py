"""The study: its measures, its sweeps, its store and its command."""

import json
import math
from dataclasses import replace

import pytest
import torch

from bench.quality import store
from bench.quality.experiments import LOW, sweep
from bench.quality.measures import effective_rank, overlap
from bench.quality.muon_ablations import smaller
from bench.quality.runs import METHODS, Run
from bench.quality.study import EXPERIMENTS, Quality, main
from bench.quality.sweeps import CENTERS, MUON, Stage, neighbors, swept
from bench.quality.tables import paired_p, rows_of
from dynlora_fn.testing import assert_within, normal

PATH = "".join(f"line {index}: {index * index}\n" for index in range(400))


# --- measures
def test_the_effective_rank_is_the_number_of_equal_singular_values():
    assert_within(effective_rank(torch.diag(torch.tensor([2.0, 2.0, 2.0, 0.0]))), torch.tensor(3.0), 1e-6)
    assert_within(effective_rank(torch.outer(torch.ones(3), torch.ones(5))), torch.tensor(1.0), 1e-5)


def test_the_overlap_is_that_of_spans():
    rows = normal(0, 3, 8)
    assert_within(overlap(rows, normal(1, 3, 3) @ rows), torch.tensor(1.0), 1e-9)
    assert_within(overlap(torch.eye(8)[:2], torch.eye(8)[1:3]), torch.tensor(0.5), 1e-6)


def test_a_paired_test_sees_differences_seed_by_seed():
    assert paired_p([1.0, 1.1, 0.9]) < 0.01
    assert paired_p([1.0, -1.1, 0.2]) > 0.5
    assert math.isnan(paired_p([math.inf, 1.0, 1.0]))


# --- sweeps
def bowl(run: Run) -> float:
    """Return a loss that is lowest at the papers' rates."""
    return abs(math.log2(run.lr / CENTERS[run.method])) + abs(math.log2(run.dense_lr))


def found_by(loss, run: Run) -> tuple[store.Found, Stage]:
    """Run the search with a loss function in place of training."""
    found: store.Found = {}
    while (stage := swept(found, run)).missing:
        found |= {missing_run: {"loss": loss(missing_run)} for missing_run in stage.missing}
    return found, stage


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("lr", "dense"), [(0, 0), (3, 0), (-4, -2), (1, 6)])
def test_every_method_is_swept_until_all_neighbors_are_worse(method, lr, dense):
    center = CENTERS[method]

    def loss(run: Run) -> float | None:
        if run.lr > 20 * center:
            return None  # diverged
        return abs(math.log2(run.lr / center) - lr) + abs(math.log2(run.lr * run.dense_lr / center) - dense)

    found, stage = found_by(loss, Run("tiny", method))
    best = stage.runs[0]
    assert (best.lr, best.lr * best.dense_lr) == (center * 2.0**lr, center * 2.0**dense)
    assert [run.seed for run in stage.runs] == [0, 1, 2]
    assert all(found[run]["loss"] is None or found[run]["loss"] > found[best]["loss"] for run in neighbors(best))


def test_a_sweep_starts_where_it_is_told_to():
    start = replace(Run("tiny", "lora"), lr=CENTERS["lora"] / 4, dense_lr=16.0)
    first = swept({}, Run("tiny", "lora", fraction=8), start=start).missing[0]
    assert first == replace(start, fraction=8)


def test_a_sweep_of_the_rate_beside_muon_keeps_the_rate_of_factors():
    low = Run("tiny", "switchlora", optimizer="muon", lr=1e-3, dense_lr=8.0, **LOW)
    found: store.Found = {}
    while missing := smaller(found, low)["SCALE, d/2"].missing:
        found |= {run: {"loss": abs(math.log2(run.dense_lr) - 5)} for run in missing}
    runs = smaller(found, low)["SCALE, d/2"].runs
    assert runs == [replace(low, dense_optimizer="scale", fraction=2, dense_lr=32.0, seed=seed) for seed in (0, 1, 2)]
    assert {run.lr for run in found} == {1e-3}
    swept = [run.dense_lr for run in found if run.fraction == 4 and run.seed == 0]
    assert sorted(swept) == [2.0, 8.0, 32.0, 128.0]


def test_larger_sizes_and_other_ranks_start_where_sweeps_of_the_same_method_ended():
    def loss(run: Run) -> float:
        return abs(math.log2(run.lr / MUON) - 2) + abs(math.log2(run.dense_lr) + 4)

    found, stage = found_by(loss, Run("small", "lora", optimizer="muon"))
    best = stage.runs[0]
    assert (best.lr, best.dense_lr) == (MUON * 4, 1 / 16)
    medium = replace(best, size="medium")
    assert sweep(found, Run("medium", "lora", optimizer="muon")).missing == [medium, *neighbors(medium)]
    assert sweep(found, Run("medium", "lora")) == Stage([], [])  # its start is not known
    eighth = Run("small", "lora", fraction=8)
    assert sweep(found, eighth).missing == sweep(found, replace(eighth, fraction=4)).missing != []
    assert sweep(found, replace(eighth, optimizer="muon")).missing[0] == replace(best, fraction=8)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_waits_for_the_sweep_of_a_smaller_size(name):
    rows = EXPERIMENTS[name]({}, "huge")
    assert all(stage.runs == [] or stage.missing for stage in rows.values())


def test_all_runs_that_an_experiment_asks_for_can_be_named_and_read_again(tmp_path):
    for name, experiment in EXPERIMENTS.items():
        found: store.Found = {}
        for _ in range(20):
            missing = {run for stage in experiment(found, "tiny").values() for run in stage.missing}
            found |= {run: {"loss": bowl(run)} for run in missing}
        for index, run in enumerate(found):
            if index < 12:
                store.append(tmp_path / f"{name}.jsonl", run, {"loss": 1.0}, "corpus")
        read = store.read(tmp_path, "corpus")
        assert set(list(found)[:12]) <= set(read)
    assert not store.read(tmp_path, "another")


def test_a_line_that_was_torn_is_run_again(tmp_path):
    path = tmp_path / "x.jsonl"
    store.append(path, Run("tiny", "full"), {"loss": 1.0}, "corpus")
    path.write_text(path.read_text() + '{"run": {"size"')
    assert list(store.read(tmp_path, "corpus")) == [Run("tiny", "full")]
    store.append(path, Run("tiny", "lora"), {"loss": 2.0}, "corpus")
    assert list(store.read(tmp_path, "corpus")) == [Run("tiny", "full"), Run("tiny", "lora")]


# --- the command
@pytest.mark.slow
def test_a_command_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text(PATH)
    text_file = (tmp_path / "text.txt",)
    config = Quality("methods", ("tiny",), text=text_file, folder=tmp_path / "out", threads=1, backend="eager")
    executed = []

    def brief(job, run, make_method):
        executed.append(run)
        return {
            "loss": bowl(run),
            "curve": [(1, 1.0)],
            "seconds": 0.0,
            "bytes": {"state": 1},
            "measures": {},
        }

    monkeypatch.setattr("bench.quality.study.execute", brief)
    main(replace(config, minutes=0))
    assert not executed
    main(replace(config, rows=("full rank",)))
    assert {run.method for run in executed} == {"full"}
    main(config)
    assert len(executed) == len(set(executed)) > 50
    count = len(executed)
    main(config)
    assert len(executed) == count
    assert "full rank" in (tmp_path / "out" / "methods.md").read_text()
    assert (tmp_path / "out" / "methods_tiny.png").stat().st_size > 1000
    main(replace(config, experiment="test"))  # the same rates and seeds, measured on another text
    chosen = {replace(run, held_out="test") for run in executed[:count] if run.seed > 0}
    assert {run for run in executed[count:] if run.seed > 0} == chosen
    assert "| test loss |" in (tmp_path / "out" / "test.md").read_text()
    assert "small" not in (tmp_path / "out" / "test.md").read_text()  # it was not begun
    found = store.read(tmp_path / "out", next(iter({line["corpus"] for line in _lines(tmp_path)})))
    rows = rows_of(found, EXPERIMENTS["methods"](found, "tiny"))
    assert [row.over_first for row in rows if row.name == "full rank"] == [0]


def _lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out" / "methods.jsonl").read_text().splitlines()]
