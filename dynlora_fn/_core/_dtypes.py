"""The dtype that sums are formed in, and autocast."""

from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import NamedTuple

import torch


def widest(*dtypes: torch.dtype) -> torch.dtype:
    """What sums of these are formed in: the widest of them, float32 at least."""
    return reduce(torch.promote_types, dtypes, torch.float32)


class Autocast(NamedTuple):
    """The first arguments of `torch.autocast`."""

    device_type: str
    dtype: torch.dtype
    enabled: bool


def autocast_now(device_type: str) -> Autocast | None:
    """What autocast is set to; None where there is none, as on the meta device."""
    if not torch.amp.is_autocast_available(device_type):
        return None
    return Autocast(device_type, torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type))


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    if not torch.amp.is_autocast_available(device_type):  # the meta device
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
