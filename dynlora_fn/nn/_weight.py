"""The tensor subclass that replaces a low-rank weight in a module.

It calls the rule of each operation.
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
    is_in_dynamo,
    make_wrapper_subclass,
    set_forward_enabled,
    tree_leaves,
    tree_map,
)
from dynlora_fn._core._types import LowRank, Param, has_no_constants
from dynlora_fn.bases._base import as_base
from dynlora_fn.nn._attributes import METADATA
from dynlora_fn.nn._checkpoints import is_in_other_checkpoint
from dynlora_fn.nn._fallback import dense_weight, permit, refuse_lost, why_lost
from dynlora_fn.nn._register import REGISTERED
from dynlora_fn.nn._rules import find_rule
from dynlora_fn.nn._view import Fallback, NoRuleError, View, gathered, no_rule, view_of


def weight_of(name: str, param: LowRank, like: Tensor, fallback: Fallback) -> Tensor:
    """Return the tensor that replaces the parameter `like` of a module."""
    view = view_of(name, param, like.shape, fallback)
    weight = _as_weight(view._replace(read_dtype=like.dtype) if _is_read_as(param, like.dtype) else view)
    weight._param = param
    return weight


def _is_read_as(param: LowRank, dtype: torch.dtype) -> bool:
    """Return whether a module reads a weight in the dtype of its parameter.

    Otherwise it reads the dtype of the factors. Factors are in float32 by default, even if the model is in bfloat16.
    Then the rows of an embedding must be in bfloat16 for the layers after it. If a user chose another dtype for the
    factors, the module reads that dtype.
    """
    return param.factors.b.dtype == torch.float32 != dtype and as_base(param.base).weight_dtype == dtype


def params_of(module: nn.Module) -> dict[str, Param]:
    """Return the parameters of a module, inside `call` as they were passed to `call`."""
    return {
        name: parameter._param if isinstance(parameter, Weight) else parameter
        for name, parameter in module.named_parameters()
    }


def fallback_of(module: nn.Module) -> Fallback:
    """Return the argument `fallback` of the `call` that runs a module."""
    for parameter in module.parameters():
        if isinstance(parameter, Weight):
            return parameter._view.fallback
    return "dense"


class Weight(Tensor):
    """The tensor that replaces a dense weight in a module, and calls the rules.

    It has the shape, dtype and device that the module expects, but no memory.
    """

    _view: View
    _param: LowRank  # what was passed to `call`; set only if the weight is a full parameter
    _has_tangent: bool = False  # in a dual level of `torch.autograd`; an `autograd.Function` would lose it

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Where a part of a model is compiled, Dynamo compares the memory of its inputs. Every weight has other memory.
        if func in METADATA or (func is Tensor.untyped_storage and is_in_dynamo()):
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        # A getter has the name `__get__`, and the name of its property is in `__self__`. Dynamo also gets methods of
        # `Tensor` that are written in Python through a getter, so a method with a rule is bound here.
        name = getattr(func, "__name__", "")
        if name == "__get__":
            method = getattr(Tensor, getattr(func.__self__, "__name__", ""), None)
            if find_rule(method, ()) is not None:
                return partial(_apply_rule, method, args[0])
        return _apply_rule(func, *args, **kwargs)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.unbind(0))


def _by_rule(getter: Any) -> property:
    """Return the property of `Weight` for a getter of `Tensor` with a rule.

    Where a part of a model is compiled, Dynamo reads a property of `Tensor` again without `__torch_function__`.
    """
    return property(lambda weight: _apply_rule(getter, weight))


for _property in ("T", "mT", "H", "mH"):
    setattr(Weight, _property, _by_rule(getattr(Tensor, _property).__get__))


class _Wrapper(Weight):
    """A `Weight` without a tensor behind it. It is used except while Dynamo traces.

    Dynamo does not trace a wrapper subclass, so it gets a plain `Weight`. Elsewhere a plain `Weight` would not do: when
    `remat` is compiled, weights are fake tensors, which `as_subclass` cannot turn into a `Weight`.
    """

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Use the dense weight for an operation that C++ code calls.

        Such a call does not reach `__torch_function__`. Autograd has already recorded the operation, and passes the
        gradient of the weight to `_Attached`.
        """
        for weight in _weights_in((args, kwargs)):
            if weight._has_tangent:
                refuse_lost(weight._view, func.__name__, "loses its tangent outside of `torch.func.jvp`")
            if _is_of_func(weight):
                refuse_lost(weight._view, func.__name__, "does not pass `torch.func`, so that its gradient is lost")
        return _fall_back(func, args, kwargs or {}, None)


def _is_of_func(weight: Weight) -> bool:
    """Return whether `torch.func`, or autograd in its place, differentiates a weight."""
    if is_in_place_of_func():
        return weight.requires_grad
    return any(is_functorch_wrapped(leaf) for leaf in tree_leaves(weight._view) if isinstance(leaf, Tensor))


def _as_weight(view: View) -> Weight:
    if torch.compiler.is_dynamo_compiling():
        # The dense weight, because Dynamo does not dispatch every use to `__torch_function__`, such as an
        # `autograd.Function`. If it is not used, it is removed from the graph. A sharded weight is not gathered here;
        # it is NaN instead, so that a use without `__torch_function__` shows in the result.
        is_sharded = any(not has_no_constants(part) and _is_sharded(part) for part in view.parts)
        weight = (_missing(view) if is_sharded else dense_weight(view)).as_subclass(Weight)
    else:
        weight = _attached(view)
        weight._has_tangent = forward_levels() > 0 and not are_transforms_active() and _has_tangent(view)
    weight._view = view
    return weight


def _is_sharded(part: LowRank) -> bool:
    return part.factor_sharding is not None or as_base(part.base).sharding is not None


def _has_tangent(view: View) -> bool:
    leaves = [leaf for leaf in tree_leaves(view) if isinstance(leaf, Tensor)]
    return any(unpack_dual(leaf).tangent is not None for leaf in leaves)  # type: ignore[no-untyped-call]


def _missing(view: View) -> Tensor:
    return view.parts[0].factors.b.new_full((), torch.nan).expand(view.shape)


def _attached(view: View) -> Weight:
    """Return a weight through which gradients reach the tensors of a view.

    If no tensor requires a gradient, it is a plain wrapper.
    """
    tensors = _tensors_of(view) if torch.is_grad_enabled() and not are_transforms_active() else []
    leaves = [leaf for leaf in tensors if leaf.requires_grad]
    if not leaves:
        return _wrapper(view)
    with set_forward_enabled(False):  # rules read tangents from the view, and other uses of tangents are refused
        weight: Weight = _Attached.apply(view, *leaves)  # type: ignore[no-untyped-call]
    return weight


def _tensors_of(view: View) -> list[Tensor]:
    """Return the tensors of a view that may require a gradient."""
    tensors: list[Tensor] = []
    for base, factors, _ in view.parts:
        leaves = [base] if isinstance(base, Tensor) else tree_leaves(base)
        tensors += [leaf for leaf in (*leaves, factors.b, factors.a) if isinstance(leaf, Tensor)]
    return [*tensors, view.scale] if isinstance(view.scale, Tensor) else tensors


def _wrapper(view: View) -> Weight:
    weight: Weight = make_wrapper_subclass(_Wrapper, view.shape, dtype=view.dtype, device=view.device)
    return weight


class _Attached(torch.autograd.Function):
    """Create a weight that passes its gradient to the tensors of a view.

    An `autograd.Function` or a C++ kernel may return such a gradient. Rules do not, because their results depend on the
    tensors of the view directly.
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
    # `linear` gathers sharded factors inside its product, and frees them after it.
    change = _view_of if func is linear else _gathered_view_of
    views = [_map_weights(change, arg) for arg in args]
    named = _map_weights(change, kwargs) if kwargs else kwargs
    try:
        result = rule(*views, **named)
    except NoRuleError as refusal:
        return _fall_back(func, args, kwargs, refusal)
    except (IndexError, TypeError):  # torch takes these arguments, or refuses them with its message
        if func in REGISTERED:
            raise
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
    """Return whether a checkpoint with `use_reentrant=True` runs the current code.

    It would recompute its block with the parameters of the model instead of the passed parameters.
    """
    frame: FrameType | None = sys._getframe()
    checkpoint = CheckpointFunction.forward.__code__
    while frame and frame.f_code is not checkpoint:
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


# Dynamo cannot trace names of operations, but calls a function with this decorator while it traces.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _name_of(func: Any) -> str:
    name: str = getattr(func, "__name__", repr(func))
    return str(func.__self__.__name__) if name in ("__get__", "__set__", "__delete__") else name


def _map_weights(change: Callable[[Weight], Any], value: Any) -> Any:
    """Apply `change` to the weights in an argument, which may be nested."""
    if isinstance(value, Tensor):
        return change(value) if isinstance(value, Weight) else value
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
    """Return the result of a rule under `torch.no_grad`, without gradients.

    A weight in the result may contain factors of an argument, which require a gradient. Views of them have tangents but
    no gradients, as results of tensor operations do. An argument that is returned unchanged stays unchanged.
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
