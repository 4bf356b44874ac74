"""The tensor that replaces a low-rank weight in a module, and answers operations by their rules."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dynlora_fn._core._torch import make_wrapper_subclass
from dynlora_fn._core._types import LowRank, Param
from dynlora_fn.nn._reshaping import METHODS
from dynlora_fn.nn._rules import RULES
from dynlora_fn.nn._view import View, gathered, refuse, view_of


def weight_of(name: str, param: LowRank, shape: torch.Size) -> Tensor:
    """Return the tensor that replaces a parameter of a module, which has this name and shape."""
    weight = _as_weight(view_of(name, param, shape))
    weight._param = param
    return weight


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
