"""Several processes of one group, for tests: forked from one that has imported what they need."""

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
_CONTEXT.set_forkserver_preload(["models.pretrain.command", "torch.distributed.tensor", "torch._dynamo"])
SECONDS = 240  # that a machine with other work may take


def in_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``function(*args)`` returns on each of `size` processes of a group on gloo.

    Raises:
        AssertionError: with the traceback of every process that fails.
    """
    with started(size, function, *args) as (_, ends):
        outcomes = [_receive(end, rank) for rank, end in enumerate(ends)]
    failures = [outcome for outcome in outcomes if isinstance(outcome, _Failure)]
    if failures:
        raise AssertionError("\n".join(failures))
    return outcomes


@contextmanager
def started(size: int, function: Callable[..., Any], *args: Any) -> Iterator[tuple[list[Any], list[Connection]]]:
    """The processes, and where each sends what it returns; in the end all are killed."""
    with TemporaryDirectory() as folder:
        ends = [_CONTEXT.Pipe() for _ in range(size)]
        processes = [
            _CONTEXT.Process(target=_work, args=(rank, size, folder, end, function, args), daemon=True)
            for rank, (_, end) in enumerate(ends)
        ]
        for process in processes:
            process.start()
        try:
            yield processes, [own for own, _ in ends]
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


class _Failure(str):
    __slots__ = ()


def _receive(end: Connection, rank: int) -> Any:
    return (
        pickle.loads(end.recv_bytes()) if end.poll(SECONDS) else _Failure(f"rank {rank} said nothing for {SECONDS} s")
    )


def _work(rank: int, size: int, folder: str, end: Connection, function: Callable[..., Any], args: Any) -> None:
    import torch  # noqa: PLC0415, where it has been imported already

    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(Path(folder) / "store"), size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    try:
        with _counted():
            outcome = function(*args)
    except BaseException:
        outcome = _Failure(f"rank {rank}: {traceback.format_exc()}")
    end.send_bytes(pickle.dumps(outcome))  # by value: tensors would share memory with a process that has ended
    torch.distributed.destroy_process_group()


@contextmanager
def _counted() -> Iterator[None]:
    """What this process reaches, where `coverage` runs the suite; it is killed before it could save that by itself."""
    if "COVERAGE_RUN" not in os.environ:
        yield
        return
    import coverage  # noqa: PLC0415, for this alone

    counter = coverage.Coverage(data_suffix=True)
    counter.start()
    try:
        yield
    finally:
        counter.stop()
        counter.save()
