"""Residuals: what codes miss, as int8 codes, a bfloat16 tensor, or nothing."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from dynlora_fn._core._check import check_device
from dynlora_fn.bases._int8 import Int8Codes
from dynlora_fn.bases._plain import Plain

Residual: TypeAlias = Int8Codes | Tensor | tuple[()]  # a plain tensor: bfloat16; (): no residual, a tree without leaves
ResidualKind: TypeAlias = Literal["int8", "bfloat16"] | None
Device: TypeAlias = torch.device | str | None

# The constants of MurmurHash3's finalizer, and 2**32 divided by the golden ratio, as signed integers.
_MIX, _GOLDEN = ((16, -2048144789), (13, -1028477387)), -1640531527
_KINDS: dict[str, type[Int8Codes] | type[Plain]] = {"int8": Int8Codes, "bfloat16": Plain}


def check_residual(residual: object, device: object = None) -> None:
    """Raise if `residual` is no format of a residual, or its device is no device."""
    check_device("residual_device", device, or_none=True)
    if residual is not None and not (isinstance(residual, str) and residual in _KINDS):
        raise ValueError(f"unknown `residual` {residual!r}; use 'int8', 'bfloat16' or None")


def make_residual(error: Tensor, residual: ResidualKind, device: Device) -> Residual:
    """Return the difference that codes miss as a residual on a device."""
    if residual is None:
        return ()
    codes = _KINDS[residual].empty("residual", error[:0]).encode_error(error)
    return residual_from_tensors([tensor.to(device or tensor.device) for tensor in codes])


def residual_tensors(residual: Residual) -> list[Tensor]:
    """Return the tensors of a residual. `residual_from_tensors` reverses it."""
    return [residual] if isinstance(residual, Tensor) else list(residual)


def residual_from_tensors(tensors: Sequence[Tensor]) -> Residual:
    """Return the residual that consists of these tensors."""
    return () if not tensors else tensors[0] if len(tensors) == 1 else Int8Codes(*tensors)


def residual_codes(residual: Residual) -> Int8Codes | Plain | None:
    """Return a residual as codes that answer for themselves, or None without one."""
    tensors = residual_tensors(residual)
    return None if not tensors else Plain(*tensors) if len(tensors) == 1 else Int8Codes(*tensors)


def scaled_residual(residual: Residual, factor: float | Tensor, key: Tensor) -> Residual:
    """Return the residual of ``factor * weight``.

    Of int8 codes only the scales are rounded. An entry in bfloat16 is rounded up or down at random, in proportion to
    the distances, so that on average nothing is lost. Rounded to nearest, it would not change at all if the factor is
    near one, however often the weight is scaled.

    Args:
        residual: The residual.
        factor: A number or a 0-d tensor.
        key: Scales of the codes in float32, (*stack) or (*stack, out, 1). They choose the random bits, so the result is
            a function of the arguments. Each row is rounded in the same way on one process and on several.
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

    bfloat16 has the upper 16 bits of float32.
    """
    rows = key.reshape(*key.shape, *(1,) * (exact.ndim - key.ndim)).view(torch.int32)
    bits = rows + torch.arange(exact.shape[-1], dtype=torch.int32, device=exact.device) * _GOLDEN
    for shift, factor in _MIX:
        bits = (bits ^ (bits >> shift & 2 ** (32 - shift) - 1)) * factor
    random = (bits ^ bits >> 16) & 0xFFFF
    return (exact.view(torch.int32) + random & ~0xFFFF).view(torch.float32).to(torch.bfloat16)
