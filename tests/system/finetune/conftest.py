"""Fixtures for the fine-tuning job from the command line."""

import sys

import pytest

from models.finetune.__main__ import main
from tests.support.finetune import Given, llama, save_given
from tests.support.pretrain import Job, Outcome

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Job:
    """Run the command in this process."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["finetune", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return save_given(llama(), tmp_path_factory.mktemp("given"))
