"""What several processes cannot do is refused."""

import sys
from pathlib import Path

import pytest

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
