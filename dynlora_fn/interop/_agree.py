"""Do work on several processes, so that all of them succeed or all raise an error."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

from dynlora_fn.parallel._group import Group, process_group

Result = TypeVar("Result")

_KINDS = (TypeError, ValueError, OSError, RuntimeError)  # the types that an error can have on the other processes


class Members(NamedTuple):
    """A group, and the place of this process in it. None is a single process."""

    process: int = 0
    world_size: int = 1
    group: torch.distributed.ProcessGroup | None = None

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every process.

        Collective: call it on every process.
        """
        values = [value] * self.world_size
        if self.group is not None:
            torch.distributed.all_gather_object(values, value, group=self.group)
        return values

    def agree(self, work: Callable[[], Result], *, first_only: bool = False) -> Result | None:
        """Do the work on every process, or on the first one only, and return its result.

        An error of one process is raised on all of them. Collective: call it on every process.
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
    """Return the members of a group or a mesh. None means a single process.

    Raises:
        TypeError: If it is neither a group nor a mesh.
        ValueError: If the mesh has more than one dimension.
    """
    if group is None:
        return Members()
    group = process_group(group)
    return Members(group.rank(), group.size(), group)
