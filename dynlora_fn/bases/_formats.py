"""The table of storage formats, in torchao's layouts but with plain tensors.

Codes are tuples of tensors, so they pass through every transform and can be donated. For a weight in float32, `encode`
returns torchao's bits. Rows and blocks of zeros are an exception, for which torchao returns NaN.
"""

from collections.abc import Iterable
from typing import TypeAlias

import torch
from torch import Tensor

from dynlora_fn.bases._float8 import Float8Codes
from dynlora_fn.bases._format import Format
from dynlora_fn.bases._int8 import Int8Codes
from dynlora_fn.bases._mxfp4 import MXFP4Codes
from dynlora_fn.bases._nf4 import NF4Codes
from dynlora_fn.bases._nvfp4 import NVFP4Codes
from dynlora_fn.bases._plain import Plain

Codes: TypeAlias = Format | Tensor  # a tensor for the format bfloat16

STABLE: dict[str, type[Format]] = {"int8": Int8Codes, "float8": Float8Codes, "nf4": NF4Codes, "bfloat16": Plain}
PROTOTYPES: dict[str, type[Format]] = {"nvfp4": NVFP4Codes, "mxfp4": MXFP4Codes}
FORMATS = STABLE | PROTOTYPES
BY_KIND = {"plain" if format_type is Plain else name: format_type for name, format_type in FORMATS.items()}
_CHOICES = (
    f"{', '.join(STABLE)}, {' or '.join(PROTOTYPES)} (prototypes in torchao), or torchao's "
    "Int8WeightOnlyConfig or Float8WeightOnlyConfig with PerRow or NVFP4WeightOnlyConfig"
)


def as_format(codes: Codes) -> Format:
    """Return codes with the methods of `Format`: wrap a plain tensor in `Plain`."""
    return Plain(codes) if isinstance(codes, Tensor) else codes


def stored(codes: Format) -> Codes:
    """Return codes in the form in which a base stores them. This reverses `as_format`."""
    return codes.tensor if isinstance(codes, Plain) else codes


def codes_from_tensors(kind: str, tensors: Iterable[Tensor]) -> Format:
    """Rebuild codes from their kind and the list of their tensors."""
    return BY_KIND[kind](*tensors)


def format_of(base: object) -> tuple[type[Format], torch.dtype | None]:
    """Return a format, and the dtype of its codes or None for the default dtype.

    Args:
        base: The name of a format, or a configuration of torchao.

    Raises:
        ValueError: If the format is unknown.
    """
    if isinstance(base, str) and base in FORMATS:
        return FORMATS[base], None
    if type(base).__module__.startswith("torchao."):
        for format_type in FORMATS.values():
            dtype = format_type.dtype_of(base)
            if dtype is not None:
                return format_type, dtype
    raise ValueError(f"unknown `base` {base!r}; use one of {_CHOICES}")
