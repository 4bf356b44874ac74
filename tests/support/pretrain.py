"""The main job as a command, with its result and its files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

MODEL = ["--model", "llama-tiny", "--rank", "8", "--batch-size", "2", "--seq-len", "32"]
SMALL = [*MODEL, "--eager", "--eval-batches", "2", "--warmup", "4", "--interval", "10", "--ratio", "1"]


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Job = Callable[..., Outcome]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
