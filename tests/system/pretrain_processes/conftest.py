"""Fixtures for the main job in several processes."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for index in range(6):
        (folder / f"{index}.txt").write_text("".join(f"{index} times {k} is {index * k}\n" for k in range(60)))
    return folder
