"""What several processes cannot do is refused."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.pretrain import reading
from models.pretrain.__main__ import main
from tests.support.pretrain_processes import arguments, job
from tests.support.processes import in_processes


def test_what_several_processes_cannot_do_is_one_line(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "run"
    for changed, message in (
        ({"batch-size": 1}, "`batch_size` must be at least the number of processes, 2, got 1"),
        ({"shard": True, "method": "full"}, "`shard` must come with frozen bases, got full, which has none"),
        ({"shard": True, "base-dtype": "nf4"}, "in nf4 and of shape (32, 32), cannot be sharded over 2 processes"),
        ({"compensate": 0.1, "shard": True, "shard-factors": True}, "`compensate` must be 0 with --shard-factors, got"),
        (
            {"candidates": "pool", "shard": True, "shard-factors": True},
            "`candidates` must be 'seeded' with --shard-factors, got 'pool'; a pool stores vectors",
        ),
        ({"shard-factors": True}, "`shard_factors` must come with --shard, got it without; sharded factors need"),
        ({"resume": True}, "`out` must contain a run to resume"),
        ({"rank": 99}, "use at least 1 and at most min(out, in) = 32"),
    ):
        outcomes = in_processes(2, job, arguments(text, out, **changed))
        assert [outcome.code for outcome in outcomes] == [2, 2]
        assert message in outcomes[0].err
        assert outcomes[0].err.count("\n") == 1
        assert outcomes[1].err == ""
        assert not out.exists()
    monkeypatch.setattr(sys, "argv", ["pretrain", *arguments(text, out, shard=True)])
    with pytest.raises(SystemExit, match="2"):
        main()


@pytest.mark.parametrize("changed", [{"rank": 99}, {"steps": 1, "warmup": 0}], ids=["refused", "trained"])
def test_a_slow_process_opens_the_tokens_before_their_folder_is_removed_or_renamed(
    text: Path, tmp_path: Path, changed: dict[str, object]
):
    outcomes = in_processes(2, job, arguments(text, tmp_path / "run", **changed), _open_late_on_the_second)
    assert [outcome.code for outcome in outcomes] == ([0, 0] if "steps" in changed else [2, 2]), outcomes
    assert outcomes[1].err == ""


def test_tokens_that_one_process_cannot_open_stop_all(text: Path, tmp_path: Path):
    outcomes = in_processes(3, job, arguments(text, tmp_path / "run"), _fail_to_open_on_the_second)
    assert [outcome.code for outcome in outcomes] == [2, 2, 2], outcomes
    assert all("not on this machine" in outcome.err for outcome in outcomes)
    assert not (tmp_path / "run").exists()


def _open_late_on_the_second(process: int) -> None:
    if process == 1:
        _open_with(lambda: time.sleep(1))


def _fail_to_open_on_the_second(process: int) -> None:
    def fail() -> None:
        raise FileNotFoundError("not on this machine")

    if process == 1:
        _open_with(fail)


def _open_with(act: Callable[[], None]) -> None:
    open_file = reading.TokenFile

    def opened(*given: Any) -> Any:
        act()
        return open_file(*given)

    reading.TokenFile = opened
