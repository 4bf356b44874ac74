"""Run an unmodified module with low-rank weights in place of its dense ones."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear

from dynlora_fn._core._check import check_module
from dynlora_fn._core._stacking import unstack
from dynlora_fn._core._torch import make_wrapper_subclass
from dynlora_fn._core._types import LowRank, Param, Params
from dynlora_fn.bases._base import as_base
from dynlora_fn.bases._flatten import refuse_differentiated
from dynlora_fn.nn._reshaping import METHODS
from dynlora_fn.nn._rules import RULES
from dynlora_fn.nn._view import View, gathered, refuse, view_of


def call(model: nn.Module, params: Params, *args: Any, **kwargs: Any) -> Any:
    """Run ``model(*args, **kwargs)`` with `params` in place of its parameters.

    The model is not changed.

    Args:
        model: Any module that uses its low-rank weights only in operations that have a rule (dynlora_fn/nn/README.md).
        params: Every parameter of the model by name, as `init` returns them. For tied parameters one name is enough.
            Buffers are taken from the model.
        *args: The positional arguments of the model.
        **kwargs: The keyword arguments of the model.

    Returns:
        What the model returns.

    Raises:
        RuntimeError: If `params` lacks a parameter of the model, or contains a name that the model does not have.
        NotImplementedError: If a low-rank weight is used in an operation without a rule. The message names both. Also if
            a base in low precision or a sharded one is differentiated.
        ValueError: If a weight does not fit the shape of its parameter, or if the model or a submodule is wrapped for
            data parallelism, which `torch.func` bypasses.

    Example:
        >>> import torch
        >>> import dynlora_fn as dl
        >>> model = nn.Linear(6, 4)
        >>> params = dl.init(model, rank=2, seed=0, targets=["weight"])
        >>> call(model, params, torch.ones(3, 6)).shape
        torch.Size([3, 4])
    """
    check_module("model", model)
    _refuse_wrappers(model)
    return call_with(model, params, dict(model.named_buffers()), args, kwargs)


def call_with(
    model: nn.Module, params: Params, buffers: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run `call` with `buffers` in place of the model's buffers."""
    for name, param in params.items():
        if isinstance(param, LowRank):
            layout, tensors = as_base(as_base(param.base).folded).flatten()
            refuse_differentiated(layout, tensors, f"the base of {name!r} in `params`")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weights: dict[str, Any] = {
        name: _weight_of(name, param, parameters[name].shape)
        if isinstance(param, LowRank) and name in parameters
        else param
        for name, param in unstack(params).items()
    }
    return functional_call(model, {**buffers, **weights}, args, kwargs, strict=True)


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


def params_of(module: nn.Module) -> dict[str, Param]:
    """Return the parameters of a module, inside `call` as they were passed to it."""
    return {
        name: parameter._param if isinstance(parameter, _Weight) else parameter
        for name, parameter in module.named_parameters()
    }


class _Weight(Tensor):
    """Replace the dense weight in a module, and answer operations by their rules.

    The tensor has the right shape, dtype and device, which a module may read, but no memory.
    """

    _view: View
    _param: LowRank  # what was passed to `call`; set only if the weight is a full parameter

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in RULES:
            return _apply_rule(RULES[func], *args, **kwargs)
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        # The getter of a property has no name; the property that it is bound to does.
        is_getter = getattr(func, "__name__", "") == "__get__"
        operation = getattr(func, "__self__", func) if is_getter else func
        operation = getattr(operation, "__name__", repr(operation))
        if is_getter and operation in METHODS:
            return partial(_apply_rule, METHODS[operation], args[0])
        refuse(next(arg for arg in (*args, *kwargs.values()) if isinstance(arg, _Weight))._view, operation)


class _Wrapper(_Weight):
    """A weight without a tensor behind it, for everything but Dynamo.

    When `remat` is compiled, the weights are fake tensors, and `as_subclass` does not turn one into another subclass.
    Dynamo traces no wrapper subclass, so it gets a `_Weight`.
    """

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return cls.__torch_function__(func, types, args, kwargs)


_PROPERTIES = ("shape", "dtype", "device", "ndim", "layout", "is_sparse", "is_nested", "is_cuda", "requires_grad")
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__hash__),
}


def _weight_of(name: str, param: LowRank, shape: torch.Size) -> Tensor:
    weight = _as_weight(view_of(name, param, shape))
    weight._param = param
    return weight


def _as_weight(view: View) -> "_Weight":
    b, shape = view.parts[0].factors.b, view.shape
    if torch.compiler.is_dynamo_compiling():
        # NaN, so that an operation that Dynamo does not dispatch to `__torch_function__` shows in the result.
        weight = b.new_full((), torch.nan).expand(shape).as_subclass(_Weight)
    else:
        weight = make_wrapper_subclass(_Wrapper, shape, dtype=b.dtype, device=b.device)
    weight._view = view
    return weight


def _apply_rule(rule: Any, *args: Any, **kwargs: Any) -> Any:
    views = [_view_of_argument(arg, rule) for arg in args]
    return _as_weights(rule(*views, **{name: _view_of_argument(arg, rule) for name, arg in kwargs.items()}))


def _view_of_argument(arg: Any, rule: Any) -> Any:
    if not isinstance(arg, _Weight):
        return arg
    # `linear` gathers sharded factors itself, and frees them before its result is freed.
    gathers = rule is RULES[linear]
    return arg._view if gathers else gathered(arg._view)


def _as_weights(result: Any) -> Any:
    if isinstance(result, View):
        return _as_weight(result)
    if type(result) is tuple:
        return tuple(_as_weights(element) for element in result)
    return result
