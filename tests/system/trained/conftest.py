"""A run of the main job whose model the programs read."""

from pathlib import Path

import pytest

from models.pretrain.__main__ import main
from tests.support.command import outcome_of
from tests.support.pretrain import SMALL

LINES = "".join(f"{factor} times {k} is {factor * k}; été\n" for factor in range(8) for k in range(40))


@pytest.fixture(scope="session")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "lines.txt"
    file.write_text(LINES)
    return file


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, lines: Path) -> Path:
    """Return the folder of a run with two checkpoints, at steps 10 and 20."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    steps = ["--steps", 20, "--save-every", 10, "--sample-every", 10, "--lr", 0.01, "--trained", "both"]
    outcome = outcome_of(main, *SMALL, "--text", lines, "--out", folder, *steps)
    assert outcome.code == 0, outcome.err
    (folder / "log.txt").write_text(outcome.out)
    return folder
