"""All names of torchao that the library uses, checked on `CHECKED`.

torchao takes a second to import, so each name is imported at its first use. The prototypes may move or change.
`tests/bases/test_torchao_names.py` fails with each name that has moved.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from torch import Tensor

CHECKED = "0.18.0"
NAMES = {
    "Float8Tensor": "torchao.quantization",
    "Float8WeightOnlyConfig": "torchao.quantization",
    "Int8Tensor": "torchao.quantization",
    "Int8WeightOnlyConfig": "torchao.quantization",
    "NF4Tensor": "torchao.quantization",
    "PerRow": "torchao.quantization",
    "to_nf4": "torchao.quantization",
    "KernelPreference": "torchao.quantization.quantize_.common.kernel_preference",
    "MXTensor": "torchao.prototype.mx_formats.mx_tensor",
    "NVFP4Tensor": "torchao.prototype.mx_formats.nvfp4_tensor",
    "dequant_with_qmap": "torchao.optim.quant_utils",
    "get_qmap_signed": "torchao.optim.subclass_8bit",
    "get_qmap_unsigned": "torchao.optim.subclass_8bit",
    "quantize_8bit_with_qmap": "torchao.optim.quant_utils",
    "scale_tensor": "torchao.optim.quant_utils",
}
# How the messages start that torchao logs at import and that do not concern the caller, by the name of the logger. They
# are about kernels for other devices, and about types that torchao registers in a deprecated way.
MESSAGES = {"torchao": "Failed to load ", "torch.utils._pytree": "%s is an Enum subclass "}


def __getattr__(name: str) -> Any:
    if name in NAMES:
        with without_messages():
            return getattr(import_module(NAMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@contextmanager
def without_messages() -> Iterator[None]:
    """Import torchao without `MESSAGES`.

    Other messages are logged, and after this context all messages are.
    """
    loggers = [logging.getLogger(name) for name in MESSAGES]
    for logger in loggers:
        logger.addFilter(_is_for_the_caller)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_for_the_caller)


def _is_for_the_caller(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(MESSAGES[record.name])


# Dynamo traces the functions below. It can trace an import statement, but not the `__getattr__` of a module.


def decode_8bit(codes: Tensor, table: Tensor, scale: Tensor) -> Tensor:
    """Decode 8-bit codes with the values in `table` and one scale for each block."""
    from torchao.optim.quant_utils import dequant_with_qmap  # noqa: PLC0415

    decoded: Tensor = dequant_with_qmap(codes, table, scale)
    return decoded


def encode_8bit(tensor: Tensor, table: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Encode in 8 bits, with the values in `table` and one scale for each block.

    A block is `block` consecutive entries of the flattened tensor.
    """
    from torchao.optim.quant_utils import quantize_8bit_with_qmap, scale_tensor  # noqa: PLC0415

    scaled, scale = scale_tensor(tensor, block)
    return quantize_8bit_with_qmap(scaled, table), scale
