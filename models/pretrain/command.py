"""A job from the command line: progress on the way, one line for what is wrong."""

import json
import sys
from collections.abc import Callable
from typing import NoReturn

import tyro
from rich.console import Console

from models.pretrain.config import Config
from models.pretrain.report import closing_table
from models.pretrain.run import DivergedError, Prepared, train


def run_command(kind: type[Config], prepare: Callable[..., Prepared], *, module: str, files: str) -> None:
    """Parses, prepares and trains: exit code 2 with one line for bad input, 130 for an interrupt.

    Args:
        kind: of the configuration.
        prepare: everything up to the first step, of a configuration and a console; raises ValueError for bad input.
        module: that is run, for its usage.
        files: that the run leaves, for its last line.
    """
    config = tyro.cli(kind, prog=f"python -m {module}")
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
    console.print(f"{run.folder}: {files}", highlight=False, soft_wrap=True)
    if config.json:
        print(json.dumps(summary))


def stop(message: str, code: int) -> NoReturn:
    print(" ".join(message.split()), file=sys.stderr)
    raise SystemExit(code)
