"""Fixtures for the main job from the command line."""

import sys
from pathlib import Path

import pytest

from models.pretrain.__main__ import main
from tests.support.pretrain import SMALL, Job, Outcome


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(6):
        (folder / f"{index}.txt").write_text("".join(f"{index} times {k} is {index * k}\n" for k in range(60)))
    return folder


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: Path) -> Job:
    """Run the command in this process."""

    def run(*arguments: object) -> Outcome:
        small = [part for part in SMALL if part != "--eager" or "--compile" not in arguments]
        monkeypatch.setattr(sys, "argv", ["pretrain", *small, "--text", str(text), *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Outcome(code, *capsys.readouterr())

    return run
