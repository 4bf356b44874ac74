"""`python -m models.pretrain`"""

import os

# Before torch loads OpenMP: threads that wait for each other sleep instead of spinning. Beside another busy process on
# the same cores a step is 12 times faster for it; alone it makes no difference.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

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
