"""`python -m models.pretrain`"""

import os

# Before torch loads OpenMP: threads that wait for each other soon sleep instead of spinning on. Beside another busy
# process on two cores, a step of the default model took 0.6 s with it and 5.8 s without; alone 0.22 s and 0.19 s.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import json
import sys
from typing import NoReturn

import tyro
from rich.console import Console

from models.pretrain.config import Config
from models.pretrain.report import closing_table
from models.pretrain.run import DivergedError, prepare, train


def main() -> None:
    """Runs the command line: exit code 2 with one line for bad input, 130 for an interrupt."""
    config = tyro.cli(Config, prog="python -m models.pretrain")
    console = Console()
    try:
        run = prepare(config, console)
    except ValueError as error:
        stop(f"error: {error}", 2)
    try:
        summary = train(run, console)
    except DivergedError as error:
        stop(f"error: {error}; checkpoints in {run.folder} are kept", 2)
    except KeyboardInterrupt:
        stop(f"interrupted: continue with --out {run.folder} --resume and the same settings", 130)
    (run.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    console.print(closing_table(summary))
    files = "model.safetensors, loss.png, metrics.jsonl, summary.json, checkpoints/"
    console.print(f"{run.folder}: {files}", highlight=False, soft_wrap=True)
    if config.json:
        print(json.dumps(summary))


def stop(message: str, code: int) -> NoReturn:
    print(" ".join(message.split()), file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
