"""Several processes of one group, for tests: forked from one that has imported what they need."""

import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["dynlora_fn", "torch.distributed.tensor", "torch.distributed.checkpoint"])
SECONDS = 240  # that a machine with other work may take


def in_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``function(*args)`` returns on each of `size` processes of a group on gloo.

    Raises:
        AssertionError: with the traceback of the first process that fails.
    """
    with TemporaryDirectory() as folder:
        ends = [_CONTEXT.Pipe() for _ in range(size)]
        processes = [
            _CONTEXT.Process(target=_work, args=(rank, size, folder, end, function, args), daemon=True)
            for rank, (_, end) in enumerate(ends)
        ]
        for process in processes:
            process.start()
        try:
            outcomes = [_receive(own, process.name) for (own, _), process in zip(ends, processes, strict=True)]
        finally:
            for process in processes:
                process.kill()
    failures = [outcome for outcome in outcomes if isinstance(outcome, _Failure)]
    if failures:
        raise AssertionError("\n".join(failures))
    return outcomes


class _Failure(str):
    __slots__ = ()


def _receive(end: Connection, name: str) -> Any:
    return pickle.loads(end.recv_bytes()) if end.poll(SECONDS) else _Failure(f"{name} said nothing for {SECONDS} s")


def _work(rank: int, size: int, folder: str, end: Connection, function: Callable[..., Any], args: Any) -> None:
    import torch  # noqa: PLC0415, where it has been imported already

    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(Path(folder) / "store"), size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    try:
        outcome = function(*args)
    except BaseException:
        outcome = _Failure(f"rank {rank}: {traceback.format_exc()}")
    end.send_bytes(pickle.dumps(outcome))  # by value: tensors would share memory with a process that has ended
    torch.distributed.destroy_process_group()
