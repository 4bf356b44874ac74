"""Work on several processes: all of them succeed, or all raise an error."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

from dynlora_fn.parallel._group import Group, process_group

Result = TypeVar("Result")

_KINDS = (TypeError, ValueError, OSError, RuntimeError)  # of errors that are raised on the other processes too


class Members(NamedTuple):
    """This process among those of a group, or without a group."""

    process: int = 0
    world_size: int = 1
    group: torch.distributed.ProcessGroup | None = None

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every process. Collective."""
        values = [value] * self.world_size
        if self.group is not None:
            torch.distributed.all_gather_object(values, value, group=self.group)
        return values

    def agree(self, work: Callable[[], Result], *, first_only: bool = False) -> Result | None:
        """Do the work on every process, or on the first one only, and return its result.

        Collective. An error of one process is raised on all of them.
        """
        result, error, failure = None, None, None
        try:
            if self.process == 0 or not first_only:
                result = work()
        except Exception as raised:
            error = raised
            kind = next((at for at, kind in enumerate(_KINDS) if isinstance(raised, kind)), len(_KINDS) - 1)
            failure = kind, str(raised)
        failures = [other for other in self.gather(failure) if other is not None]
        if error is not None:
            raise error
        if failures:
            raise _KINDS[failures[0][0]]("; ".join(dict.fromkeys(text for _, text in failures)))
        return result


def members_of(group: "Group | None") -> Members:
    """Return this process among those of a group or a mesh.

    Without one it is the only process.
    """
    if group is None:
        return Members()
    group = process_group(group)
    return Members(group.rank(), group.size(), group)
