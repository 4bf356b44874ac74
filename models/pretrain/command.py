"""A job from the command line: progress on the way, one line for what is wrong."""

import json
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

import tyro
from rich.console import Console

from dynlora_fn.parallel import DriftedError
from models.pretrain.checkpoint import SaveError
from models.pretrain.config import Config, continued
from models.pretrain.ranks import Ranks, is_restarted, joined
from models.pretrain.recorder import DivergedError
from models.pretrain.report import closing_table
from models.pretrain.run import Prepared, train


def run_command(kind: type[Config], prepare: Callable[..., Prepared], *, module: str, files: str) -> None:
    """Parses, prepares and trains: exit code 2 with one line for bad input, 130 for an interrupt, 0 once SIGTERM has
    led to a checkpoint. Of several processes, which `torchrun` starts, the first one writes and prints.

    Args:
        kind: of the configuration.
        prepare: everything up to the first step, of a configuration, a console and the processes; raises ValueError for
            bad input.
        module: that is run, for its usage.
        files: that the run leaves, for its last line.
    """
    config = tyro.cli(kind, prog=f"python -m {module}")
    # Of torch.distributed.checkpoint, where one process saves by itself.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    with joined() as ranks:
        _run(config, prepare, ranks, files)


def _run(config: Config, prepare: Callable[..., Prepared], ranks: Ranks, files: str) -> None:
    console = Console(quiet=not ranks.is_first)
    try:
        run = prepare(continued(config) if ranks.any(is_restarted()) else config, console, ranks)
    except ValueError as error:
        stop(f"error: {error}", 2, ranks)
    again = f"continue with --out {run.folder} --resume and the same settings"
    try:
        summary = train(run, console)
    except (DivergedError, DriftedError, SaveError) as error:
        stop(f"error: {error}; checkpoints in {run.folder} are kept", 2, ranks)
    except KeyboardInterrupt:
        stop(f"interrupted: {again}", 130, ranks)
    if not ranks.is_first:
        return
    if summary is None:
        console.print(f"asked to end, and saved: {again}", highlight=False, soft_wrap=True)
        return
    (run.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    console.print(closing_table(summary))
    console.print(f"{run.folder}: {files}", highlight=False, soft_wrap=True)
    if config.json:
        print(json.dumps(summary))


def stop(message: str, code: int, ranks: Ranks) -> NoReturn:
    if ranks.is_first:
        print(" ".join(message.split()), file=sys.stderr)
    raise SystemExit(code)
