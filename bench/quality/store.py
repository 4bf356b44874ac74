"""Store finished runs, one JSON object per line.

A run that is stored is not executed a second time.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bench.quality.runs import Run

Found = dict[Run, dict[str, Any]]


def read(folder: Path, corpus: str) -> Found:
    """Return the runs of all experiments in the folder that trained on a corpus."""
    found: Found = {}
    for path in sorted(folder.glob("*.jsonl")):
        for text in _lines(path):
            line = json.loads(text)
            if line["corpus"] == corpus:
                found[Run(**line["run"])] = line
    return found


def sizes_in(path: Path) -> set[str]:
    """Return the sizes of the runs in a file, on any corpus."""
    return {json.loads(text)["run"]["size"] for text in _lines(path)}


def _lines(path: Path) -> list[str]:
    """Return the lines of a file, without an incomplete last line."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


def append(path: Path, run: Run, result: Mapping[str, Any], corpus: str) -> dict[str, Any]:
    """Append a run and return its line.

    An incomplete last line is removed first.
    """
    line = {"run": run.described(), "corpus": corpus, **result, **origin()}
    if path.exists() and not (old := path.read_bytes()).endswith(b"\n"):
        path.write_bytes(old[: old.rfind(b"\n") + 1])  # a process was killed while it wrote
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return line


@cache
def origin() -> dict[str, Any]:
    """Return commit, command and versions.

    They are cached, because the working tree may change after the code was loaded.
    """
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    return {
        "commit": commit,
        "command": " ".join(["python -m bench.quality", *sys.argv[1:]]),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
