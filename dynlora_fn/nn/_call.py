"""How a low-rank weight reaches an unmodified module."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear

from dynlora_fn._core._stacking import unstack
from dynlora_fn._core._torch import make_wrapper_subclass
from dynlora_fn._core._types import LowRank, Param, Params
from dynlora_fn.nn._rules import METHODS, RULES
from dynlora_fn.nn._view import View, gathered, refuse, view_of


def call(model: nn.Module, params: Params, *args: Any, **kwargs: Any) -> Any:
    """``model(*args, **kwargs)`` with `params` for its parameters; the model itself is left as it is.

    Args:
        model: any module that uses its low-rank weights by operations that there is a rule for (`rules.py`).
        params: of every parameter of the model (of tied ones, one name). Buffers are the model's own.

    Raises:
        RuntimeError: if a parameter of the model is missing or one is unknown to it.
        NotImplementedError: if a low-rank weight is used in an operation without a rule; it names both.
        ValueError: if the model is wrapped for data parallelism, or a part of it, which `torch.func` bypasses.
    """
    _refuse_wrappers(model)
    return call_with(model, params, dict(model.named_buffers()), args, kwargs)


def call_with(
    model: nn.Module, params: Params, buffers: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """`call` with `buffers` for the model's own."""
    own = dict(model.named_parameters(remove_duplicate=False))
    weights: dict[str, Any] = {
        name: _given(name, param, own[name].shape) if isinstance(param, LowRank) and name in own else param
        for name, param in unstack(params).items()
    }
    return functional_call(model, {**buffers, **weights}, args, kwargs, strict=True)


def _refuse_wrappers(model: nn.Module) -> None:
    """Their gradients hang on hooks of autograd on the module's own parameters, and here neither takes part."""
    for name, module in model.named_modules():
        for kind in type(module).__mro__:
            if kind.__name__ in _WRAPPERS and kind.__module__.startswith("torch."):
                rule = (
                    "be the module itself: a wrapper's hooks see no gradient here, and ranks would drift apart unseen"
                )
                instead = "reduce the gradients with `all_reduce_mean`, and `shard` the bases"
                where = f" at {name!r}" if name else ""
                raise ValueError(f"`model` must {rule}; {instead}, got {kind.__name__}{where}")


_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule")


def params_of(module: nn.Module) -> dict[str, Param]:
    """A module's own parameters, as they were given to `call` where it runs inside of one."""
    return {
        name: parameter._param if isinstance(parameter, _Weight) else parameter
        for name, parameter in module.named_parameters()
    }


class _Weight(Tensor):
    """Stands for the dense weight in a module and answers operations by their rules.

    A view without memory of the right shape, since a module may look at its weight's shape, dtype and device.
    """

    _view: View
    _param: LowRank  # as it was given to `call`, if it is a parameter as a whole

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in RULES:
            return _follow(RULES[func], *args, **kwargs)
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        # A property's getter is named by the property that it is bound to.
        is_getter = getattr(func, "__name__", "") == "__get__"
        operation = getattr(func, "__self__", func) if is_getter else func
        operation = getattr(operation, "__name__", repr(operation))
        if is_getter and operation in METHODS:
            return partial(_follow, METHODS[operation], args[0])
        refuse(next(arg for arg in (*args, *kwargs.values()) if isinstance(arg, _Weight))._view, operation)


class _Wrapper(_Weight):
    """Without a tensor behind it: a fake tensor, which `remat` meets when it is compiled, becomes no other subclass.
    Dynamo, on the other hand, traces no wrapper."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return cls.__torch_function__(func, types, args, kwargs)


_PROPERTIES = ("shape", "dtype", "device", "ndim", "layout", "is_sparse", "is_nested", "is_cuda", "requires_grad")
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__hash__),
}


def _given(name: str, param: LowRank, shape: torch.Size) -> Tensor:
    weight = _as_weight(view_of(name, param, shape))
    weight._param = param
    return weight


def _as_weight(view: View) -> "_Weight":
    b, shape = view.parts[0].factors.b, view.shape
    if torch.compiler.is_dynamo_compiling():
        # Not a number, so that an operation that Dynamo does not dispatch could not go unseen.
        weight = b.new_full((), torch.nan).expand(shape).as_subclass(_Weight)
    else:
        weight = make_wrapper_subclass(_Wrapper, shape, dtype=b.dtype, device=b.device)
    weight._view = view
    return weight


def _follow(rule: Any, *args: Any, **kwargs: Any) -> Any:
    views = [_view_in(arg, rule) for arg in args]
    return _as_weights(rule(*views, **{name: _view_in(arg, rule) for name, arg in kwargs.items()}))


def _view_in(arg: Any, rule: Any) -> Any:
    if not isinstance(arg, _Weight):
        return arg
    gathers = rule is RULES[linear]  # sharded factors itself, and not for as long as the result is needed
    return arg._view if gathers else gathered(arg._view)


def _as_weights(result: Any) -> Any:
    if isinstance(result, View):
        return _as_weight(result)
    if type(result) is tuple:
        return tuple(_as_weights(one) for one in result)
    return result
