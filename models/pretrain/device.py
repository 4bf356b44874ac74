"""The device and the data type that a run computes on."""

import torch

from models.pretrain.config import Config

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def run_device(config: Config) -> torch.device:
    """Return the device that the run trains on.

    Raises:
        ValueError: If this machine does not have the device.
    """
    return find_device("device", config.machine.device)


def find_device(option: str, name: str) -> torch.device:
    """Return the device called `name`, after a test that it can be used.

    Raises:
        ValueError: If this machine does not have the device. The message starts with `option`.
    """
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it has no memory for values")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"`{option}` must be one that this machine has, got {name!r}: {reason}") from error
    return device


def compute_dtype(config: Config) -> torch.dtype:
    """Return the dtype of the activations."""
    return _DTYPES[config.precision.compute_dtype]
