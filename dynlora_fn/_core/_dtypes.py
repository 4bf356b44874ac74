"""The dtype that sums are computed in, autocast, and bytes."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import reduce
from typing import NamedTuple

import torch


def widest(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype to compute sums in: the widest of these, and at least float32."""
    return reduce(torch.promote_types, dtypes, torch.float32)


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor in a dtype.

    A conversion to the same dtype takes as long as a small product.
    """
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def byte_view(tensor: torch.Tensor) -> torch.Tensor:
    """Return a flat view of the bytes of a contiguous tensor.

    A tensor with one entry is contiguous whatever its strides are, but torch views bytes only of stride 1.
    """
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


class Autocast(NamedTuple):
    """The first arguments of `torch.autocast`."""

    device_type: str
    dtype: torch.dtype
    enabled: bool


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_autocast(device_type: str) -> bool:
    """Return whether a device has autocast.

    Dynamo of torch 2.11 cannot trace the question.
    """
    return torch.amp.is_autocast_available(device_type)


def autocast_now(device_type: str) -> Autocast | None:
    """Return the current setting of autocast, or None on a device without it.

    The meta device is one.
    """
    if device_type != "cpu" and not _has_autocast(device_type):
        return None
    return Autocast(device_type, torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type))


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype of a product with an input.

    Autocast takes neither float64 nor complex inputs, as in torch.
    """
    autocast = autocast_now(x.device.type)
    is_cast = autocast is not None and autocast.enabled and x.dtype != torch.float64 and not x.dtype.is_complex
    return autocast.dtype if is_cast and autocast is not None else x.dtype


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    """Disable autocast on a device, if the device has it."""
    if device_type != "cpu" and not _has_autocast(device_type):
        return nullcontext()
    if not torch.compiler.is_dynamo_compiling() and not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


@contextmanager
def without_cached_casts() -> Iterator[None]:
    """Let autocast cast a tensor at each use.

    Its cache keeps the cast of each leaf until the outermost autocast ends, so that new leaves in a loop fill it.
    """
    is_cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(is_cached)
