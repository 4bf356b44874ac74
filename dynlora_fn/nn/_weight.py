"""The tensor in place of a low-rank weight in a module.

It answers operations by their rules.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.nn.functional import linear
from torch.utils.checkpoint import CheckpointFunction

from dynlora_fn._core._func_scope import is_in_place_of_func
from dynlora_fn._core._torch import (
    are_transforms_active,
    forward_levels,
    is_forward_enabled,
    is_functorch_wrapped,
    make_wrapper_subclass,
    set_forward_enabled,
    tree_leaves,
    tree_map,
)
from dynlora_fn._core._types import LowRank, Param
from dynlora_fn.bases._base import as_base
from dynlora_fn.nn._attributes import METADATA
from dynlora_fn.nn._checkpoints import is_in_other_checkpoint
from dynlora_fn.nn._fallback import dense_weight, permit, refuse_lost, why_lost
from dynlora_fn.nn._rules import find_rule
from dynlora_fn.nn._view import Fallback, NoRuleError, View, gathered, no_rule, view_of


def weight_of(name: str, param: LowRank, like: Tensor, fallback: Fallback) -> Tensor:
    """Return the tensor that replaces a parameter of a module, which has this name."""
    view = view_of(name, param, like.shape, fallback)
    weight = _as_weight(view._replace(read_dtype=like.dtype) if _is_read_as(param, like.dtype) else view)
    weight._param = param
    return weight


def _is_read_as(param: LowRank, dtype: torch.dtype) -> bool:
    """Return whether a module reads a weight in its dtype.

    Otherwise it reads it in the dtype of the factors. So the rows of an embedding fit the layers that read them.
    Factors are in float32 by default, whatever the model is in. Users choose other dtypes.
    """
    return param.factors.b.dtype == torch.float32 != dtype and as_base(param.base).weight_dtype == dtype


def params_of(module: nn.Module) -> dict[str, Param]:
    """Return the parameters of a module, inside `call` as they were passed to it."""
    return {
        name: parameter._param if isinstance(parameter, Weight) else parameter
        for name, parameter in module.named_parameters()
    }


def fallback_of(module: nn.Module) -> Fallback:
    """Return what a module, inside `call`, does for operations without a rule."""
    for parameter in module.parameters():
        if isinstance(parameter, Weight):
            return parameter._view.fallback
    return "dense"


class Weight(Tensor):
    """Replace the dense weight in a module, and answer operations by their rules.

    The tensor has the right shape, dtype and device, which a module may read, but no memory.
    """

    _view: View
    _param: LowRank  # what was passed to `call`; set only if the weight is a full parameter
    _has_tangent: bool = False  # in a dual level of `torch.autograd`; an `autograd.Function` would lose it

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        # The getter of a property has no name; the property that it is bound to does. Dynamo gets methods of `Tensor`
        # that are written in Python in the same way.
        name = getattr(func, "__name__", "")
        if name == "__get__":
            method = getattr(Tensor, getattr(func.__self__, "__name__", ""), None)
            if find_rule(method, ()) is not None:
                return partial(_apply_rule, method, args[0])
        return _apply_rule(func, *args, **kwargs)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.unbind(0))


class _Wrapper(Weight):
    """A weight without a tensor behind it, for everything but Dynamo.

    When `remat` is compiled, the weights are fake tensors, and `as_subclass` does not turn one into another subclass.
    Dynamo traces no wrapper subclass, so it gets a `Weight`.
    """

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Compute with the dense weight what C++ code does to it.

        Such code is below `__torch_function__`. Autograd has recorded the operation, and passes the gradient of the
        weight to `_Attached`.
        """
        for weight in _weights_in((args, kwargs)):
            if weight._has_tangent:
                refuse_lost(weight._view, func.__name__, "loses its tangent outside of `torch.func.jvp`")
            if _is_of_func(weight):
                refuse_lost(weight._view, func.__name__, "does not pass `torch.func`, so that its gradient is lost")
        return _fall_back(func, args, kwargs or {}, None)


def _is_of_func(weight: Weight) -> bool:
    """Return whether `torch.func`, or autograd for it, differentiates by a weight."""
    if is_in_place_of_func():
        return weight.requires_grad
    return any(is_functorch_wrapped(leaf) for leaf in tree_leaves(weight._view) if isinstance(leaf, Tensor))


def _as_weight(view: View) -> Weight:
    if torch.compiler.is_dynamo_compiling():
        # The dense weight, for what Dynamo does not dispatch to `__torch_function__`, such as an `autograd.Function`.
        # If it is not used, it is removed from the graph. NaN in place of a gathered weight shows in the result.
        is_sharded = any(part.factor_sharding or as_base(part.base).sharding for part in view.parts)
        weight = (_missing(view) if is_sharded else dense_weight(view)).as_subclass(Weight)
    else:
        weight = _attached(view)
        weight._has_tangent = forward_levels() > 0 and not are_transforms_active() and _has_tangent(view)
    weight._view = view
    return weight


def _has_tangent(view: View) -> bool:
    leaves = [leaf for leaf in tree_leaves(view) if isinstance(leaf, Tensor)]
    return any(unpack_dual(leaf).tangent is not None for leaf in leaves)  # type: ignore[no-untyped-call]


def _missing(view: View) -> Tensor:
    return view.parts[0].factors.b.new_full((), torch.nan).expand(view.shape)


def _attached(view: View) -> Weight:
    """Return a weight through which gradients reach tracked factors.

    Autograd must track them.
    """
    tensors = _tensors_of(view) if torch.is_grad_enabled() and not are_transforms_active() else []
    leaves = [leaf for leaf in tensors if leaf.requires_grad]
    if not leaves:
        return _wrapper(view)
    with set_forward_enabled(False):  # rules have the tangents, and other uses are refused
        weight: Weight = _Attached.apply(view, *leaves)  # type: ignore[no-untyped-call]
    return weight


def _tensors_of(view: View) -> list[Tensor]:
    """Return the tensors of a view that may be differentiated by."""
    tensors: list[Tensor] = []
    for base, factors, _ in view.parts:
        leaves = [base] if isinstance(base, Tensor) else tree_leaves(base)
        tensors += [leaf for leaf in (*leaves, factors.b, factors.a) if isinstance(leaf, Tensor)]
    return [*tensors, view.scale] if isinstance(view.scale, Tensor) else tensors


def _wrapper(view: View) -> Weight:
    weight: Weight = make_wrapper_subclass(_Wrapper, view.shape, dtype=view.dtype, device=view.device)
    return weight


class _Attached(torch.autograd.Function):
    """Return a weight whose gradient reaches the factors from any function.

    An `autograd.Function` or a C++ kernel may return it. Rules do not need it: their results depend on the factors
    themselves.
    """

    @staticmethod
    def forward(ctx: Any, view: View, *leaves: Tensor) -> Weight:
        ctx.view = view
        ctx.save_for_backward(*leaves)
        return _wrapper(view)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        keeps_graph = torch.is_grad_enabled()  # for a second derivative
        permit(ctx.view, "autograd.Function", no_rule(ctx.view, "autograd.Function"))
        with torch.enable_grad():
            weight = dense_weight(ctx.view)
        leaves = ctx.saved_tensors
        return None, *torch.autograd.grad(weight, leaves, grad, create_graph=keeps_graph, allow_unused=True)


def _apply_rule(func: Any, /, *args: Any, **kwargs: Any) -> Any:
    rule = find_rule(func, kwargs)
    if rule is None:
        return _fall_back(func, args, kwargs, None)
    # `linear` gathers sharded factors itself, and frees them before its result is freed.
    change = _view_of if func is linear else _gathered_view_of
    views, named = _map_weights(change, args), _map_weights(change, kwargs)
    try:
        result = rule(*views, **named)
    except NoRuleError as refusal:
        return _fall_back(func, args, kwargs, refusal)
    except IndexError:  # of a dim or an index that torch refuses with its message
        return _fall_back(func, args, kwargs, None)
    return _as_weights(result if torch.is_grad_enabled() else _without_grad(result, views))


def _view_of(weight: Weight) -> View:
    if not torch.compiler.is_dynamo_compiling() and weight._has_tangent and not is_forward_enabled():
        refuse_lost(weight._view, "autograd.Function", "loses its tangent outside of `torch.func.jvp`")
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling() and _is_in_reentrant_checkpoint():
        raise NotImplementedError(
            f"low-rank weight {weight._view.name!r} is used in `torch.utils.checkpoint` with use_reentrant=True, which"
            " recomputes with the parameters of the model, so that its gradient would be lost; use `remat`, or"
            " use_reentrant=False with `checkpoint_contexts`"
        )
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and is_in_other_checkpoint():
        raise NotImplementedError(
            f"low-rank weight {weight._view.name!r} is used in `torch.utils.checkpoint`, which recomputes with the "
            "parameters of the model; pass `context_fn=checkpoint_contexts(model)` to it, or use `remat`"
        )
    return weight._view


def _is_in_reentrant_checkpoint() -> bool:
    """Return whether `torch.utils.checkpoint` will recompute the running block.

    It would recompute it with the parameters of the model.
    """
    frame: FrameType | None = sys._getframe()
    while frame and frame.f_code is not CheckpointFunction.forward.__code__:
        frame = frame.f_back
    return frame is not None


def _gathered_view_of(weight: Weight) -> View:
    return gathered(_view_of(weight))


def _fall_back(func: Any, args: Any, kwargs: Any, refusal: NoRuleError | None) -> Any:
    """Apply an operation to the dense weights in its arguments."""
    operation = _name_of(func)
    weights = _weights_in((args, kwargs))
    reason = why_lost(func, operation, args, kwargs, lambda value: len(_weights_in(value)) > 0)
    if reason is not None:
        refuse_lost(weights[0]._view, operation, reason)
    for weight in weights:
        permit(weight._view, operation, refusal or no_rule(weight._view, operation))
    args, kwargs = _map_weights(_dense, args), _map_weights(_dense, kwargs)
    if getattr(func, "__name__", "") == "__get__":
        return getattr(args[0], operation)
    return func(*args, **kwargs)


def _dense(weight: Weight) -> Tensor:
    return dense_weight(_view_of(weight))


# Dynamo cannot trace names of operations. It calls a function that is marked so while it traces.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _name_of(func: Any) -> str:
    name: str = getattr(func, "__name__", repr(func))
    return str(func.__self__.__name__) if name in ("__get__", "__set__", "__delete__") else name


def _map_weights(change: Callable[[Weight], Any], value: Any) -> Any:
    """Apply `change` to the weights in an argument, which may be nested."""
    if isinstance(value, Weight):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)([_map_weights(change, element) for element in value])
    if type(value) is dict:
        return {key: _map_weights(change, element) for key, element in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[_map_weights(change, element) for element in value])
    return value


def _weights_in(value: Any) -> list[Weight]:
    weights: list[Weight] = []
    _map_weights(weights.append, value)
    return weights


def _without_grad(result: Any, arguments: Sequence[Any]) -> Any:
    """Return weights that a rule made under `torch.no_grad`.

    They have tangents and no gradients, as any tensor. A rule may pass on the factors that it got, which require a
    gradient. What is an argument itself stays.
    """
    if type(result) is tuple:
        return tuple(_without_grad(element, arguments) for element in result)
    if not isinstance(result, View) or any(result is argument for argument in arguments):
        return result
    scale = result.scale.view_as(result.scale) if isinstance(result.scale, Tensor) else result.scale
    return result._replace(parts=tree_map(lambda leaf: leaf.view_as(leaf), result.parts), scale=scale)


def _as_weights(result: Any) -> Any:
    if isinstance(result, View):
        return _as_weight(result)
    if type(result) is tuple:
        return tuple(_as_weights(element) for element in result)
    return result
