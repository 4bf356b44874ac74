"""How a low-rank weight reaches an unmodified module."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dynlora_fn.contraction import linear
from dynlora_fn.stacking import unstack
from dynlora_fn.types import LowRank, Param, Params


def call(model: nn.Module, params: Params, *args: Any, **kwargs: Any) -> Any:
    """``model(*args, **kwargs)`` with `params` for its parameters; the model itself is left as it is.

    Args:
        model: any module; low-rank weights may be used by `torch.nn.functional.linear`, as `nn.Linear` does.
        params: of every parameter of the model (of tied ones, one name). Buffers are the model's own.

    Raises:
        RuntimeError: if a parameter of the model is missing or one is unknown to it.
        NotImplementedError: if a low-rank weight is used in an operation without a rule; it names both.
    """
    return call_with(model, params, dict(model.named_buffers()), args, kwargs)


def call_with(
    model: nn.Module, params: Params, buffers: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """`call` with `buffers` for the model's own."""
    weights = {
        name: _as_weight(name, param) if isinstance(param, LowRank) else param
        for name, param in unstack(params).items()
    }
    return functional_call(model, {**buffers, **weights}, args, kwargs, strict=True)


def params_of(module: nn.Module) -> dict[str, Param]:
    """A module's own parameters, as they were given to `call` where it runs inside of one."""
    return {
        name: parameter._param if isinstance(parameter, _Weight) else parameter
        for name, parameter in module.named_parameters()
    }


class _Weight(Tensor):
    """Stands for the dense weight in a module and answers `linear` with the low-rank contraction.

    A view without memory of the right shape, since a module may look at its weight's shape, dtype and device.
    """

    _name: str
    _param: LowRank

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            return _linear(*args, **(kwargs or {}))
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        weight = next(arg for arg in (*args, *(kwargs or {}).values()) if isinstance(arg, _Weight))
        # A property's getter is named by the property that it is bound to.
        operation = getattr(func, "__self__", func) if getattr(func, "__name__", "") == "__get__" else func
        operation = getattr(operation, "__name__", repr(operation))
        # Not a TypeError: the operators of Tensor take that for an unsupported operand and hide the message.
        raise NotImplementedError(f"low-rank weight {weight._name!r} must be used by `linear`, got `{operation}`")


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


def _as_weight(name: str, param: LowRank) -> Tensor:
    b, a = param.factors
    shape = (*b.shape[:-1], a.shape[-1])
    if torch.compiler.is_dynamo_compiling():
        weight = b[..., :1].expand(shape).as_subclass(_Weight)
    else:
        weight = Tensor._make_wrapper_subclass(_Wrapper, shape, dtype=b.dtype, device=b.device)
    weight._name, weight._param = name, param
    return weight


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    for name, argument in (("input", input), ("bias", bias)):
        if isinstance(argument, _Weight):
            raise NotImplementedError(
                f"low-rank weight {argument._name!r} must be the weight of `linear`, got it as its {name}"
            )
    assert isinstance(weight, _Weight)
    return linear(input, weight._param, bias)
