"""The table and the plots of loss against memory, traffic and time."""

import json
from dataclasses import replace

from bench.quality.frontier import MUON, Point, best_recorded, frontier, recorded, step_times, unbeaten, write_frontier
from bench.quality.runs import Run
from bench.quality.sweeps import Stage

RUN = Run("tiny", "switchlora", fraction=2, lr=1e-3, dense_lr=8.0)


def line(loss):
    return {"loss": loss, "bytes": {"state": 1000, "bases": 100, "factors": 10}}


def test_a_row_has_the_best_of_the_recorded_rates_that_ran_with_two_seeds():
    better, once = replace(RUN, lr=2e-3), replace(RUN, lr=4e-3)
    found = {replace(RUN, seed=seed): line(3.0) for seed in (0, 1, 2)}
    found |= {replace(better, seed=0): line(2.0), replace(better, seed=2): line(3.0)}
    found |= {once: line(1.0), replace(RUN, trained="b", seed=0): line(0.0), replace(RUN, fraction=4): line(0.0)}
    stage = best_recorded(found, Run("tiny", "switchlora", fraction=2))
    assert stage.runs == [replace(better, seed=0), replace(better, seed=2)]
    assert best_recorded(found, Run("tiny", "full")).runs == []


def test_a_rate_that_diverged_is_not_the_best():
    found = {replace(RUN, seed=0): line(3.0), replace(RUN, seed=1): line(3.0)}
    diverged = replace(RUN, lr=2e-3)
    found |= {diverged: line(None), replace(diverged, seed=1): line(1.0)}
    assert {run.lr for run in best_recorded(found, RUN).runs} == {1e-3}


def test_points_are_unbeaten_if_cheaper_ones_have_more_loss():
    points = [
        Point("a", 3.0, 1, 9, None),
        Point("b", 2.0, 2, 8, 0.9),
        Point("c", 2.0, 3, 7, 0.8),
        Point("d", 1.0, 3, 7, 1.0),
    ]
    assert [point.name for point in unbeaten(points, "memory")] == ["a", "b", "d"]
    assert [point.name for point in unbeaten(points, "sent")] == ["d"]
    assert [point.name for point in unbeaten(points, "time")] == ["c", "d"]


def test_a_table_has_stars_times_and_a_plot(tmp_path):
    folder = tmp_path / "quality"
    folder.mkdir()
    (tmp_path / "step_sides_some.json").write_text(json.dumps({"full rank": 1.0, "switched, Muon at d/2": 1.25}))
    muon, full = replace(RUN, **MUON), Run("tiny", "full")
    found = {replace(run, seed=seed): line(loss) for run, loss in ((muon, 1.5), (full, 2.5)) for seed in (0, 1)}
    write_frontier(folder, "recorded", found, {"tiny": recorded(found, "tiny")})
    written = (folder / "recorded.md").read_text()
    assert "| switched, Muon, d/2 | 0.001, 0.008 | 1.5000 | 1.500, 1.500 |" in written
    assert written.count("1.25 *") == written.count("1.00 *") == 1
    assert (folder / "recorded_tiny.png").stat().st_size > 1000
    assert step_times(folder) == {}


def test_times_come_from_all_files_and_the_last_of_them_wins(tmp_path):
    (tmp_path / "step_sides_a.json").write_text(json.dumps({"full rank": 1.0, "switched": 3.0, "switched at d/8": 2.0}))
    (tmp_path / "step_sides_b.json").write_text(json.dumps({"full rank": 1.0, "switched": 1.5}))
    assert step_times(tmp_path) == {"full rank": 1.0, "switched, d/4": 1.5}
    (tmp_path / "step_sides_a.json").write_text(json.dumps({"switched, Muon at d/8": 2.0}))
    assert step_times(tmp_path)["switched, Muon, d/8"] == 2.0


def test_other_methods_have_one_precision_and_are_recorded():
    rows = frontier({}, "tiny", lambda _, run: Stage([], [replace(run, lr=0.5)]))
    assert rows["Spectron, d/2"].runs == [Run("tiny", "spectron", 2, lr=0.5)]
    assert not [name for name in rows if name.startswith(("Spectron", "GaLore")) and name.endswith("low precision")]
    spectron = Run("tiny", "spectron", 2, lr=0.5)
    found = {replace(spectron, seed=seed): line(1.0) for seed in (0, 1)}
    assert recorded(found, "tiny")["Spectron, d/2"].runs == list(found)


def test_rows_in_low_precision_have_the_rates_of_float32():
    rows = frontier({}, "tiny", lambda _, run: Stage([], [replace(run, lr=0.5)]))
    (run,) = rows["switched, Muon, d/2"].runs
    low = rows["switched, Muon, d/2, low precision"]
    assert run.lr == 0.5
    assert low.missing == low.runs == [replace(run, base="int8+bfloat16", moments="8bit", gradients="bfloat16")]
