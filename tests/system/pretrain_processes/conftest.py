"""Fixtures for the main job in several processes."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number in range(6):
        (folder / f"{number}.txt").write_text("".join(f"{number} times {k} is {number * k}\n" for k in range(60)))
    return folder
