"""The dtype to compute sums in, and helpers for casts, autocast and bytes."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import reduce
from typing import NamedTuple

import torch


def widest(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype to compute sums in: the widest dtype, but at least float32."""
    return reduce(torch.promote_types, dtypes, torch.float32)


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert a tensor to a dtype, or return it if it has that dtype.

    Calling `tensor.to` with the same dtype changes nothing, but takes as long as a small product.
    """
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def byte_view(tensor: torch.Tensor) -> torch.Tensor:
    """Return a flat view of the bytes of a contiguous tensor.

    Torch views bytes only of a tensor with stride 1, and a contiguous tensor with one entry may have any stride.
    """
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


class Autocast(NamedTuple):
    """The first arguments of `torch.autocast`."""

    device_type: str
    dtype: torch.dtype
    enabled: bool


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_autocast(device_type: str) -> bool:
    """Return whether a device type supports autocast.

    The result is a constant while Dynamo traces, because Dynamo of torch 2.11 cannot trace `is_autocast_available`.
    """
    return torch.amp.is_autocast_available(device_type)


def autocast_now(device_type: str) -> Autocast | None:
    """Return the current setting of autocast, or None on a device without autocast.

    The meta device is an example.
    """
    if device_type != "cpu" and not _has_autocast(device_type):
        return None
    return Autocast(device_type, torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type))


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype of a product with an input.

    Autocast takes neither float64 nor complex inputs, as in torch.
    """
    device_type = x.device.type
    if (device_type != "cpu" and not _has_autocast(device_type)) or not torch.is_autocast_enabled(device_type):
        return x.dtype
    is_cast = x.dtype != torch.float64 and not x.dtype.is_complex
    return torch.get_autocast_dtype(device_type) if is_cast else x.dtype


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    """Disable autocast on a device that supports it."""
    if device_type != "cpu" and not _has_autocast(device_type):
        return nullcontext()
    if not torch.compiler.is_dynamo_compiling() and not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


@contextmanager
def without_cached_casts() -> Iterator[None]:
    """Disable the cache of autocast, so that a tensor is cast at each use.

    The cache keeps the cast of each leaf until the outermost autocast ends. A loop that creates leaves would fill it.
    """
    is_cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(is_cached)
