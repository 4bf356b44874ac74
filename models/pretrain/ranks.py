"""The processes that `torchrun` starts: who they are, what each takes of a batch, and what they tell each other."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import distributed
from torch.distributed import ProcessGroup


class Ranks(NamedTuple):
    """This process among all of a run."""

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None  # None: started by itself, with nobody to tell anything

    @property
    def is_first(self) -> bool:
        """The one that writes and prints."""
        return self.rank == 0

    def rows(self, count: int) -> slice:
        """Which of so many rows are this process's, at least one if there are as many as processes."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def share(self, count: int) -> float:
        """Of so many rows."""
        rows = self.rows(count)
        return (rows.stop - rows.start) / count

    def agree(self, value: Any) -> Any:
        """The first one's value, everywhere."""
        values = [value]
        if self.group is not None:
            distributed.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def first_of(self, value: Any) -> Any:
        """The first value that is not None, everywhere."""
        values: list[Any] = [value] * self.size
        if self.group is not None:
            distributed.all_gather_object(values, value, group=self.group)
        return next((one for one in values if one is not None), None)

    def any(self, value: bool) -> bool:
        return bool(self.first_of(value or None))

    def background_group(self) -> ProcessGroup | None:
        """The same processes for another thread, whose messages must not be taken for this one's."""
        return None if self.group is None else distributed.new_group(backend="gloo")


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """Among the processes that `torchrun` started, or alone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield ALONE
        return
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, size = next(distributed.rendezvous("env://"))
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        # On one machine torchrun keeps its store when it starts processes anew, and in it the addresses of the dead.
        store = distributed.PrefixStore(f"attempt-{_restarts()}", store)
    backend = "cpu:gloo,cuda:nccl" if has_cuda else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield Ranks(rank, size, distributed.group.WORLD)
    finally:
        distributed.destroy_process_group()


def is_restarted() -> bool:
    """Whether `torchrun` has started the processes of this machine anew: it does not tell those of others."""
    return _restarts() > 0


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


class Preemption:
    """Whether this process has been asked to end, by SIGTERM, since it began to listen."""

    def __init__(self) -> None:
        self.is_asked = False

    def __enter__(self) -> "Preemption":
        self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _ask(self, *_: object) -> None:
        self.is_asked = True
