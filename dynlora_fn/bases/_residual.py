"""Residuals: what codes miss, as int8 codes, a bfloat16 tensor, or nothing."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from dynlora_fn.bases._int8 import Int8Codes
from dynlora_fn.bases._plain import Plain

Residual: TypeAlias = Int8Codes | Tensor | tuple[()]  # a plain tensor: bfloat16; (): no residual, a tree without leaves
ResidualKind: TypeAlias = Literal["int8", "bfloat16"] | None
Device: TypeAlias = torch.device | str | None

_KINDS: dict[str, type[Int8Codes] | type[Plain]] = {"int8": Int8Codes, "bfloat16": Plain}


def check_residual(residual: object) -> None:
    """Raise ValueError if `residual` is not the name of a residual's format, or None."""
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
    """Return a residual as codes that answer for themselves, or None if there is no residual."""
    tensors = residual_tensors(residual)
    return None if not tensors else Plain(*tensors) if len(tensors) == 1 else Int8Codes(*tensors)


def scaled_residual(residual: Residual, factor: float | Tensor) -> Residual:
    """Return the residual of ``factor * weight``. bfloat16 is rounded, and of int8 codes only the scales are."""
    codes = residual_codes(residual)
    if codes is None:
        return ()
    factor = factor.to(next(iter(codes)).device) if isinstance(factor, Tensor) else factor
    scaled = codes.scaled(factor)
    return residual_from_tensors(
        list(codes.encode_error(codes.decode(torch.float32) * factor) if scaled is None else scaled)
    )
