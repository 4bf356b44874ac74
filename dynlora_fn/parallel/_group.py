"""Process groups, the sharding of rows over them, and the weights of means."""

from typing import TypeAlias

import torch
from torch.distributed.device_mesh import DeviceMesh

from dynlora_fn._core._check import check_number, described
from dynlora_fn._core._torch import resolve_process_group
from dynlora_fn._core._types import Sharding

Group: TypeAlias = "torch.distributed.ProcessGroup | DeviceMesh"


def sharding_of(group: Group, rows: int) -> Sharding:
    """Return how `rows` rows are sharded over the processes of a group."""
    group = process_group(group)
    return Sharding(group.group_name, group.size(), group.rank(), rows)


def process_group(group: Group) -> torch.distributed.ProcessGroup:
    """Return the process group of a mesh of one dimension, or the group itself.

    Raises:
        TypeError: If it is neither.
        ValueError: If the mesh has more than one dimension.
    """
    if isinstance(group, torch.distributed.ProcessGroup):
        return group
    if not isinstance(group, DeviceMesh):
        raise TypeError(f"`group` is {described(group)}; pass a process group, or a mesh of one dimension")
    if group.ndim != 1:
        raise ValueError(
            f"`group` is a mesh of {group.ndim} dimensions; pass a mesh of one dimension, such as mesh['data']"
        )
    return group.get_group()


def has_processes_of(group: torch.distributed.ProcessGroup, name: str) -> bool:
    """Return whether a group has the processes of the named group, in the same order."""
    ranks = torch.distributed.get_process_group_ranks
    return group.group_name == name or ranks(group) == ranks(resolve_process_group(name))


def check_weight(weight: float) -> float:
    """Return the weight of a process in a mean, once it is checked.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is not in [0, 1].
    """
    return check_number("weight", weight, least=0, most=1)
