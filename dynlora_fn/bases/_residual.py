"""Residuals: the rounding errors of codes, in int8, in bfloat16, or not stored."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from dynlora_fn._core._check import check_device
from dynlora_fn.bases._int8 import Int8Codes
from dynlora_fn.bases._plain import Plain

Residual: TypeAlias = Int8Codes | Tensor | tuple[()]  # a tensor for bfloat16; () for none, since it has no leaves
ResidualKind: TypeAlias = Literal["int8", "bfloat16"] | None
Device: TypeAlias = torch.device | str | None

# The constants of MurmurHash3's finalizer, and 2**32 divided by the golden ratio, as signed integers.
_MIX, _GOLDEN = ((16, -2048144789), (13, -1028477387)), -1640531527
_KINDS: dict[str, type[Int8Codes] | type[Plain]] = {"int8": Int8Codes, "bfloat16": Plain}


def check_residual(residual: object, device: object = None) -> None:
    """Raise if `residual` is not a format of residuals, or `device` is not a device."""
    check_device("residual_device", device, or_none=True)
    if residual is not None and not (isinstance(residual, str) and residual in _KINDS):
        raise ValueError(f"unknown `residual` {residual!r}; use 'int8', 'bfloat16' or None")


def make_residual(name: str, error: Tensor, residual: ResidualKind, device: Device) -> Residual:
    """Encode the rounding error of the codes of one weight as a residual on a device.

    Raises:
        ValueError: If the weight is on the meta device, and `device` is another one.
    """
    if residual is None:
        return ()
    if error.is_meta and device is not None and torch.device(device).type != "meta":
        raise ValueError(
            f"the weight {name!r} is on meta, so `residual_device` cannot be {str(device)!r}; pass residual_device=None"
        )
    codes = _KINDS[residual].empty("residual", error[:0]).encode_error(error)
    return residual_from_tensors([tensor.to(device or tensor.device) for tensor in codes])


def residual_tensors(residual: Residual) -> list[Tensor]:
    """Return the tensors of a residual. `residual_from_tensors` reverses it."""
    return [residual] if isinstance(residual, Tensor) else list(residual)


def residual_from_tensors(tensors: Sequence[Tensor]) -> Residual:
    """Rebuild a residual from its tensors."""
    return () if not tensors else tensors[0] if len(tensors) == 1 else Int8Codes(*tensors)


def residual_codes(residual: Residual) -> Int8Codes | Plain | None:
    """Return a residual as codes with the methods of `Format`, or None if it is ()."""
    tensors = residual_tensors(residual)
    return None if not tensors else Plain(*tensors) if len(tensors) == 1 else Int8Codes(*tensors)


def scaled_residual(residual: Residual, factor: float | Tensor, key: Tensor) -> Residual:
    """Return the residual of ``factor * weight``.

    In int8 codes only the scales are rounded. An entry in bfloat16 is rounded up or down at random, and its expected
    value is exact. If it were rounded to nearest, repeated scaling by a factor close to 1 would never change it.

    Args:
        residual: The residual.
        factor: A number or a 0-d tensor.
        key: The scales of the codes in float32, (*stack) or (*stack, out, 1). The random bits are a hash of them, so
            the result depends only on the arguments. The rows of a sharded base are rounded as on one process.
    """
    codes = residual_codes(residual)
    if codes is None:
        return ()
    device = next(iter(codes)).device
    factor = factor.to(device) if isinstance(factor, Tensor) else factor
    scaled = codes.scaled(factor)
    if scaled is not None:
        return residual_from_tensors(list(scaled))
    return _round_at_random(codes.decode(torch.float32) * factor, key.to(device))


def _round_at_random(exact: Tensor, key: Tensor) -> Tensor:
    """Round a float32 tensor (*stack, out, in) to bfloat16 at random.

    bfloat16 has the upper 16 bits of float32. Random lower bits are added before the lower 16 bits are cut off.
    """
    rows = key.reshape(*key.shape, *(1,) * (exact.ndim - key.ndim)).view(torch.int32)
    bits = rows + torch.arange(exact.shape[-1], dtype=torch.int32, device=exact.device) * _GOLDEN
    for shift, factor in _MIX:
        bits = (bits ^ (bits >> shift & 2 ** (32 - shift) - 1)) * factor
    random = (bits ^ bits >> 16) & 0xFFFF
    return (exact.view(torch.int32) + random & ~0xFFFF).view(torch.float32).to(torch.bfloat16)
