"""Run an unmodified module with low-rank weights in place of its dense ones."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn
from torch.func import functional_call

from dynlora_fn._core._stacking import unstack
from dynlora_fn._core._types import LowRank, Params
from dynlora_fn.nn._view import Fallback
from dynlora_fn.nn._weight import weight_of


def call(
    model: nn.Module, params: Params, *args: Any, fallback: Literal["dense", "raise"] = "dense", **kwargs: Any
) -> Any:
    """Run ``model(*args, **kwargs)`` with `params` in place of its parameters.

    The model is not changed. A low-rank weight is used by the rule of each operation (dynlora_fn/nn/README.md).

    Args:
        model: Any module.
        params: Every parameter of the model by name, as `init` returns them. For tied parameters one name is enough.
            Buffers are taken from the model.
        *args: The positional arguments of the model.
        fallback: What to do for an operation without a rule. "dense" forms the dense weight for it, through which
            gradients reach the factors, and warns once for each weight and operation. "raise" refuses it. A model that
            has an argument `fallback` takes it by position.
        **kwargs: The keyword arguments of the model.

    Returns:
        What the model returns.

    Raises:
        RuntimeError: If `params` lacks a parameter of the model, or contains a name that the model does not have.
        NotImplementedError: If a low-rank weight is changed in place, or used in an operation without a rule under
            ``fallback="raise"``. The message names both.
        ValueError: If `fallback` is unknown, if a weight does not fit the shape of its parameter, or if the model or a
            submodule is wrapped for data parallelism, which `torch.func` bypasses.

    Example:
        >>> import torch
        >>> import dynlora_fn as dl
        >>> model = nn.Linear(6, 4)
        >>> params = dl.init(model, rank=2, seed=0, targets=["weight"])
        >>> call(model, params, torch.ones(3, 6)).shape
        torch.Size([3, 4])
    """
    if fallback not in ("dense", "raise"):
        raise ValueError(f"`fallback` is {fallback!r}; use 'dense' or 'raise'")
    _refuse_wrappers(model)
    return call_with(model, params, dict(model.named_buffers()), args, kwargs, fallback)


def call_with(
    model: nn.Module,
    params: Params,
    buffers: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    fallback: Fallback,
) -> Any:
    """Run `call` with `buffers` in place of the model's buffers."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weights: dict[str, Any] = {
        name: weight_of(name, param, parameters[name].shape, fallback)
        if isinstance(param, LowRank) and name in parameters
        else param
        for name, param in unstack(params).items()
    }
    return functional_call(model, {**buffers, **weights}, args, dict(kwargs), strict=True)


def _refuse_wrappers(model: nn.Module) -> None:
    """Raise for DDP, FSDP and `DataParallel`.

    Their gradients are reduced by autograd hooks on the module's parameters, and `call` uses neither.
    """
    for name, module in model.named_modules():
        for kind in type(module).__mro__:
            if kind.__name__ in _WRAPPERS and kind.__module__.startswith("torch."):
                where = f"submodule {name!r} of `model`" if name else "`model`"
                raise ValueError(
                    f"{where} is wrapped in {kind.__name__}, whose gradient hooks do not run here, so that replicas "
                    "would drift apart; pass the unwrapped module, reduce gradients with `all_reduce_mean` and shard "
                    "bases with `shard`"
                )


_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule")
