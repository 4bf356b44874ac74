"""Several processes of one group, for tests.

They are forked from one that has imported what they need.
"""

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["models.pretrain.command", "torch.distributed.tensor", "torch._functorch.partitioners"]
)
SECONDS = 240  # enough for a busy machine


def in_processes(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Return what ``function(*args)`` returns on each process of a group.

    The group is on gloo with one thread.

    Raises:
        AssertionError: with the traceback of every process that fails.
    """
    with started(world_size, function, *args) as (_, receivers):
        outcomes = [_receive(receiver, process) for process, receiver in enumerate(receivers)]
    failures = [outcome for outcome in outcomes if isinstance(outcome, _Failure)]
    if failures:
        raise AssertionError("\n".join(failures))
    return outcomes


@contextmanager
def started(world_size: int, function: Callable[..., Any], *args: Any) -> Iterator[tuple[list[Any], list[Connection]]]:
    """Start the processes, and yield them with the pipes of their results.

    At the end all are killed.
    """
    with TemporaryDirectory() as folder:
        pipes = [_CONTEXT.Pipe() for _ in range(world_size)]
        processes = [
            _CONTEXT.Process(target=_work, args=(process, world_size, folder, sender, function, args), daemon=True)
            for process, (_, sender) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        try:
            yield processes, [receiver for receiver, _ in pipes]
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


class _Failure(str):
    __slots__ = ()


def _receive(receiver: Connection, process: int) -> Any:
    if receiver.poll(SECONDS):
        return pickle.loads(receiver.recv_bytes())
    return _Failure(f"process {process} sent nothing for {SECONDS} s")


def _work(
    process: int, world_size: int, folder: str, sender: Connection, function: Callable[..., Any], args: Any
) -> None:
    import torch  # noqa: PLC0415, where it has been imported already

    import dynlora_fn as dl  # noqa: PLC0415, as torch

    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(Path(folder) / "store"), world_size)
    torch.distributed.init_process_group(dl.parallel.register_gloo(), store=store, rank=process, world_size=world_size)
    try:
        with _counted():
            outcome = function(*args)
    except BaseException:
        outcome = _Failure(f"process {process}: {traceback.format_exc()}")
    sender.send_bytes(pickle.dumps(outcome))  # by value: tensors would share memory with a process that has ended
    torch.distributed.destroy_process_group()


@contextmanager
def _counted() -> Iterator[None]:
    """Count the lines that run, under `coverage`.

    A process is killed before it could save them by itself.
    """
    if "COVERAGE_RUN" not in os.environ:
        yield
        return
    import coverage  # noqa: PLC0415, for this only

    counter = coverage.Coverage(data_suffix=True)
    counter.start()
    try:
        yield
    finally:
        counter.stop()
        counter.save()
