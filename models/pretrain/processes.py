"""Join the processes that `torchrun` starts, and let them divide the work.

`Processes` gives the index of this process, its rows of a batch, and values that all processes agree on.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import distributed
from torch.distributed import ProcessGroup

import dynlora_fn as dl


class Processes(NamedTuple):
    """This process among all processes of a run."""

    process: int = 0  # index of this process
    world_size: int = 1
    group: ProcessGroup | None = None  # None means that this is the only process, started without torchrun

    @property
    def is_first(self) -> bool:
        """Whether this is the first process, which writes and prints."""
        return self.process == 0

    def rows(self, count: int) -> slice:
        """Return the slice of `count` rows for this process.

        The slice is not empty if there are at least `world_size` rows.
        """
        return slice(self.process * count // self.world_size, (self.process + 1) * count // self.world_size)

    def weight(self, count: int) -> float:
        """Return the weight of this process in a mean over `count` rows."""
        rows = self.rows(count)
        return (rows.stop - rows.start) / count

    def from_first(self, value: Any) -> Any:
        """Return the value that the first process passes.

        Collective: call it on every process.
        """
        values = [value]
        if self.group is not None:
            distributed.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def do_on_first(self, action: Callable[[], Any]) -> Any:
        """Call a function on the first process, and return its result on every process.

        Collective: call it on every process. If the function raises a ValueError or an OSError, every process raises
        it.
        """
        return self.from_first(self.do_on_every(lambda: action() if self.is_first else None))

    def do_on_every(self, action: Callable[[], Any]) -> Any:
        """Call a function on every process, and return its result once all have called it.

        Collective: call it on every process. If the function raises a ValueError or an OSError on some processes, every
        process raises: the error of this process, or otherwise the first one.
        """
        result = error = None
        try:
            result = action()
        except (ValueError, OSError) as raised:
            error = raised
        first_error = self.first_not_none(error)
        if first_error is not None:
            raise error or first_error
        return result

    def first_not_none(self, value: Any) -> Any:
        """Return the value of the first process whose value is not None.

        Collective: call it on every process.
        """
        values: list[Any] = [value] * self.world_size
        if self.group is not None:
            distributed.all_gather_object(values, value, group=self.group)
        return next((value for value in values if value is not None), None)

    def any(self, value: bool) -> bool:
        """Return whether any process passes True.

        Collective: call it on every process.
        """
        return bool(self.first_not_none(value or None))

    def background_group(self) -> ProcessGroup | None:
        """Create a group of the same processes for another thread.

        A separate group keeps the messages of the two threads apart. Collective: call it on every process.
        """
        return None if self.group is None else distributed.new_group(backend=dl.parallel.register_gloo())


SINGLE_PROCESS = Processes()


@contextmanager
def join_processes() -> Iterator[Processes]:
    """Join the processes that `torchrun` has started.

    Without `torchrun`, yield `SINGLE_PROCESS`.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield SINGLE_PROCESS
        return
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, process, world_size = next(distributed.rendezvous("env://"))
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        # On one machine torchrun keeps its store across restarts, with the addresses of processes that have died.
        store = distributed.PrefixStore(f"attempt-{_restarts()}", store)
    gloo = dl.parallel.register_gloo()
    backend = f"cpu:{gloo},cuda:nccl" if has_cuda else gloo
    distributed.init_process_group(backend, store=store, rank=process, world_size=world_size)
    try:
        yield Processes(process, world_size, distributed.group.WORLD)
    finally:
        distributed.destroy_process_group()


def is_restarted() -> bool:
    """Return whether `torchrun` has restarted the processes of this machine.

    `torchrun` does not report restarts on other machines.
    """
    return _restarts() > 0


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
