"""A job on the command line: it shows progress, and reports an error in one line."""

import json
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

import tyro
from rich.console import Console

from dynlora_fn.parallel import DriftedError
from models.pretrain.checkpoint import SaveError
from models.pretrain.config import Config
from models.pretrain.folder import resume_after_restart
from models.pretrain.prepared import Prepared
from models.pretrain.processes import Processes, is_restarted, join_processes
from models.pretrain.recorder import DivergedError
from models.pretrain.report import closing_table
from models.pretrain.run import train


def run_command(config_type: type[Config], prepare: Callable[..., Prepared], *, module: str, files: str) -> None:
    """Parse the options, prepare the run and train.

    The exit code is 2 for bad input, with one line on stderr; 130 for an interrupt; 0 if SIGTERM led to a checkpoint.
    Of several processes started by `torchrun`, the first one writes and prints.

    Args:
        config_type: The class of the options.
        prepare: A function of options, console and processes that does everything up to the first step. It raises
            ValueError for bad input.
        module: The name of the module that is run, for the usage line.
        files: The files that the run writes, for the last line.
    """
    # Without prefixes the groups structure the help, and a flag is the name of its field.
    config = tyro.cli(config_type, prog=f"python -m {module}", config=(tyro.conf.OmitArgPrefixes,))
    # torch.distributed.checkpoint warns where a single process saves.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    with join_processes() as processes:
        _run(config, prepare, processes, files)


def _run(config: Config, prepare: Callable[..., Prepared], processes: Processes, files: str) -> None:
    console = Console(quiet=not processes.is_first)
    try:
        config = resume_after_restart(config) if processes.any(is_restarted()) else config
        run = prepare(config, console, processes)
    except ValueError as error:
        stop(f"error: {error}", 2, processes)
    advice = f"continue with --out {run.folder} --resume and the same settings"
    try:
        summary = train(run, console)
    except (DivergedError, DriftedError, SaveError) as error:
        stop(f"error: {error}; the checkpoints in {run.folder} remain", 2, processes)
    except KeyboardInterrupt:
        stop(f"interrupted: {advice}", 130, processes)
    if not processes.is_first:
        return
    if summary is None:
        console.print(f"stopped by SIGTERM after a checkpoint: {advice}", highlight=False, soft_wrap=True)
        return
    (run.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    console.print(closing_table(summary))
    console.print(f"{run.folder}: {files}", highlight=False, soft_wrap=True)
    if config.output.json:
        print(json.dumps(summary))


def stop(message: str, code: int, processes: Processes) -> NoReturn:
    """Print one line on stderr, from the first process, and exit."""
    if processes.is_first:
        print(" ".join(message.split()), file=sys.stderr)
    raise SystemExit(code)
