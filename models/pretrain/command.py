"""Run a training program on the command line, with errors in one line."""

import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from rich.console import Console

from dynlora_fn.parallel import DriftedError
from models.pretrain.checkpoint import SaveError
from models.pretrain.config import Config
from models.pretrain.folder import resume_after_restart
from models.pretrain.prepared import Prepared
from models.pretrain.processes import SINGLE_PROCESS, Processes, is_restarted, join_processes
from models.pretrain.recorder import DivergedError
from models.pretrain.report import closing_table
from models.pretrain.run import train
from models.pretrain.settings import parse
from models.pretrain.stopping import (
    Interrupted,
    Stopped,
    described,
    name_of,
    naming,
    program,
    raise_on_signals,
    resume_command,
    what_is_left,
)
from models.program import hide_import_messages


class Job(NamedTuple):
    """A program that trains."""

    module: str  # the name after `python -m`
    prepare: Callable[..., Prepared]  # a function of (config, console, processes) up to the first step
    files: Sequence[str]  # the names of the files that it writes, for the last line


def run_command(
    config_type: type[Config], prepare: Callable[..., Prepared], *, module: str, files: Sequence[str]
) -> None:
    """Parse the options, prepare the run and train.

    Bad input and errors of files print one line on stderr, with the exit code 2. If `torchrun` has started several
    processes, the first one writes and prints.

    Ctrl-C, SIGTERM and SIGHUP stop the program as follows.

    - While the run is prepared: at once, with the exit code 128 plus the number of the signal.
    - In training: after a checkpoint, with the exit code 130 for Ctrl-C and 0 for the other signals.
    - At a second Ctrl-C in training: at once, with the exit code 130.

    Args:
        config_type: The class of the options.
        prepare: A function of options, console and processes that does everything up to the first step. It raises
            ValueError for bad input.
        module: The name of the module that is run, for the usage line.
        files: The names of the files that the run writes. The last line has those that exist.
    """
    hide_import_messages()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # for a stream that replaces them in a notebook or a test
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # for file names not in UTF-8
    with reported(SINGLE_PROCESS, ValueError, left=lambda _: None):
        config = parse(config_type, " ".join(program(module)))
    with join_processes() as processes:
        _run(config, Job(module, prepare, files), processes)


def _run(config: Config, job: Job, processes: Processes) -> None:
    # Names of files and samples may contain what rich takes for markup, or for the name of an emoji.
    console = Console(quiet=not processes.is_first, markup=False, emoji=False)
    before = config.output.out if config.output.resume else None
    with raise_on_signals():
        with reported(processes, ValueError, left=lambda _: what_is_left(before, job.module, processes)):
            config = resume_after_restart(config) if processes.any(is_restarted()) else config
            run = job.prepare(config, console, processes)

        def left(error: BaseException) -> str:
            has_diverged = isinstance(error, DivergedError)
            return what_is_left(run.folder, job.module, processes, has_diverged=has_diverged)

        with reported(processes, DivergedError, DriftedError, SaveError, left=left):
            result = train(run, console)
            if isinstance(result, Stopped):
                _announce(result, run, job, console)
                raise SystemExit(result.code)
            if processes.is_first:
                _conclude(result, run, job, console)


def _announce(stopped: Stopped, run: Prepared, job: Job, console: Console) -> None:
    going_on = resume_command(job.module, run.folder, run.processes)
    text = f"stopped by {name_of(stopped.signal)} after a checkpoint of step {stopped.step}: continue with {going_on}"
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def _conclude(summary: dict[str, Any], run: Prepared, job: Job, console: Console) -> None:
    """Write the summary of the run and print it.

    If the run had ended before this command, its summary is not replaced.
    """
    path = run.folder / "summary.json"
    finished = _read_summary(path) if run.first_step == run.config.training.steps else None
    if finished is None:
        with naming(path):
            path.write_text(json.dumps(summary, indent=1) + "\n")
    console.print(closing_table(finished or summary))
    files = [name for name in job.files if (run.folder / name).exists()]
    console.print(f"{run.folder}: {', '.join(files)}", highlight=False, soft_wrap=True, markup=False)
    if run.config.output.json:
        print(json.dumps(finished or summary))


def _read_summary(path: Path) -> dict[str, Any] | None:
    try:
        summary = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) else None


@contextmanager
def reported(
    processes: Processes, *errors: type[Exception], left: Callable[[BaseException], str | None]
) -> Iterator[None]:
    """End the program with one line at an OSError, a signal or an error in `errors`.

    Args:
        processes: The processes of the run. Each one prints its OSError, and only the first one prints other errors.
        errors: The types of errors to report in one line. Errors of other types keep their traceback.
        left: A function of the error that returns a text about the results so far, or None. The text ends the line. It
            is omitted for an error in `errors` if they contain ValueError, which means bad input.
    """
    try:
        yield
    except OSError as error:
        _stop(_line(f"error: {described(error)}", left(error)), 2)
    except errors as error:
        is_of_input = ValueError in errors
        _stop(_line(f"error: {described(error)}", None if is_of_input else left(error)), 2, processes)
    except KeyboardInterrupt as interrupt:
        number = interrupt.number if isinstance(interrupt, Interrupted) else signal.SIGINT
        _stop(_line(f"stopped at once by {name_of(number)}", left(interrupt)), 128 + number, processes)


def _line(text: str, left: str | None) -> str:
    return f"{text}; {left}" if left else text


def _stop(message: str, code: int, processes: Processes = SINGLE_PROCESS) -> NoReturn:
    """Print one line on stderr, from the first process, and exit."""
    if processes.is_first:
        with suppress(OSError):  # a terminal that is closed
            print(" ".join(message.split()), file=sys.stderr)
    raise SystemExit(code)
