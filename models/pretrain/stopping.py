"""Stop a run before its end at a signal or an error, and report what remains."""

import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from models.pretrain.processes import Processes

# SIGHUP is sent when a terminal is closed. Windows does not have it.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGINT") if hasattr(signal, name))
_CHECKPOINT = re.compile("step-([0-9]{8})")


class Stopped(NamedTuple):
    """The end of a run that a signal stopped after a checkpoint."""

    step: int
    signal: int | None  # None means that another process has received it

    @property
    def code(self) -> int:
        """The exit code: 130 for Ctrl-C, which also ends a calling script, or 0."""
        return 128 + signal.SIGINT if self.signal == signal.SIGINT else 0


class Interrupted(KeyboardInterrupt):
    """An interrupt by a signal that ends the program at once."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def name_of(number: int | None) -> str:
    """Return the name of a signal for a message."""
    if number is None:
        return "another process"
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle the signals that ask a program to stop.

    Signals that the parent process has set to be ignored remain ignored. For example, `nohup` ignores SIGHUP.
    """
    previous = {number: signal.getsignal(number) for number in _SIGNALS}
    handled = {number: before for number, before in previous.items() if before not in (signal.SIG_IGN, None)}
    for number in handled:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in handled.items():
            signal.signal(number, before)


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """Raise `Interrupted` at SIGTERM, SIGHUP and Ctrl-C.

    The exception lets context managers remove unfinished files.
    """

    def interrupt(number: int, _: FrameType | None) -> None:
        raise Interrupted(number)

    with _handled(interrupt):
        yield


class Preemption:
    """A recorder of requests to stop after a checkpoint.

    SIGTERM, SIGHUP and a first Ctrl-C are such requests. A second Ctrl-C raises `Interrupted`.

    Args:
        notify: A function that is called with the number of each recorded signal.
    """

    def __init__(self, notify: Callable[[int], None] = lambda _: None):
        self.signal: int | None = None
        self._notify = notify
        self._can_interrupt = False

    @property
    def is_requested(self) -> bool:
        """Whether this process has received a signal."""
        return self.signal is not None

    def __enter__(self) -> "Preemption":
        self._context = _handled(self._request)
        self._context.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._context.__exit__(None, None, None)

    def _request(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self._can_interrupt:
            raise Interrupted(number)
        self._can_interrupt |= number == signal.SIGINT
        self.signal = number if self.signal is None else self.signal
        self._notify(number)


def last_checkpoint(folder: Path) -> int | None:
    """Return the step of the newest checkpoint of a run, or None.

    The checkpoint is not read, so it may be damaged.
    """
    try:
        matches = [_CHECKPOINT.fullmatch(path.name) for path in (folder / "checkpoints").iterdir()]
    except OSError:
        return None
    return max((int(match[1]) for match in matches if match), default=None)


def what_is_left(folder: Path | None, module: str, processes: Processes, *, has_diverged: bool = False) -> str:
    """Name the last checkpoint of a run and how to continue, for an error message.

    Args:
        folder: The folder of the run. None means that there was no run before.
        module: The name of the module that is run.
        processes: The processes of the run.
        has_diverged: Whether the run has diverged. It would diverge again from the checkpoint, so the text names
            options for a new run.
    """
    if folder is None:
        return "no step was taken"
    step = last_checkpoint(folder)
    found = f"{folder} contains no checkpoint" if step is None else f"the last checkpoint is step {step}"
    if has_diverged:
        repeats = "" if step is None else ", and the same steps would follow"
        return f"{found}{repeats}; start a new run with a lower --lr or --dense-lr, or a longer --warmup"
    return found if step is None else f"{found}; continue with {resume_command(module, folder, processes)}"


def program(module: str) -> list[str]:
    """Return the command that started this program: a console script or a module."""
    script = Path(sys.argv[0]).name
    return [script] if script.startswith("dynlora-") else ["python", "-m", module]


def resume_command(module: str, folder: Path, processes: Processes) -> str:
    """Return the command line that continues a run."""
    start = program(module)
    if processes.group is not None:
        start = ["torchrun", "--nproc-per-node", str(processes.world_size), "-m", module]
    return shlex.join([*start, "--out", str(folder), "--resume"])


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the name `path` to an OSError without a file name.

    For example, the error for a full disk has no file name.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def described(error: Exception) -> str:
    """Return an error as one line.

    An OSError with a file name becomes its reason, followed by this name.
    """
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {str(error.filename)!r}"
    return " ".join(str(error).split()) or type(error).__name__
