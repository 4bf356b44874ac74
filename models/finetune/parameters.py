"""Move and convert the parameters of a module in place.

Tied parameters stay tied.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def drop_values(model: nn.Module) -> None:
    """Move the parameters to the meta device, which frees their memory.

    The state of a run contains their values already.
    """
    _replace(model, lambda parameter: parameter.to("meta"))


def convert(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert all floating-point parameters and saved buffers to a dtype.

    Buffers that are not saved keep their dtype.
    """
    _replace(model, lambda parameter: parameter.to(dtype) if parameter.is_floating_point() else parameter)
    for name, leaf in model.state_dict(keep_vars=True).items():
        if not isinstance(leaf, nn.Parameter) and leaf.is_floating_point():
            _set(model, name, leaf.to(dtype))


def _replace(model: nn.Module, changed: Callable[[Tensor], Tensor]) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    replacements = {
        id(parameter): nn.Parameter(changed(parameter.detach()), parameter.requires_grad)
        for parameter in parameters.values()
    }
    for name, parameter in parameters.items():
        _set(model, name, replacements[id(parameter)])


def _set(model: nn.Module, name: str, leaf: Tensor) -> None:
    prefix, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(prefix), attribute, leaf)
