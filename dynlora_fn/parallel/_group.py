"""The group that a collective runs over, and how rows are sharded over it."""

from typing import TypeAlias

import torch
from torch.distributed.device_mesh import DeviceMesh

from dynlora_fn._core._types import Sharding

Group: TypeAlias = "torch.distributed.ProcessGroup | DeviceMesh"


def sharding_of(group: Group, rows: int) -> Sharding:
    """Return how `rows` rows are sharded over the processes of a group."""
    group = process_group(group)
    return Sharding(group.group_name, group.size(), group.rank(), rows)


def process_group(group: Group) -> torch.distributed.ProcessGroup:
    """Return the process group of a mesh of one dimension, or the group itself.

    Raises:
        ValueError: If the mesh has more than one dimension.
    """
    if not isinstance(group, DeviceMesh):
        return group
    if group.ndim != 1:
        raise ValueError(
            f"`group` is a mesh of {group.ndim} dimensions; pass a mesh of one dimension, such as mesh['data']"
        )
    return group.get_group()
