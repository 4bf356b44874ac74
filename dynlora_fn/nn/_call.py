"""`call`: run an unmodified module with low-rank weights."""

from collections.abc import Mapping
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dynlora_fn._core._check import check_choice, check_module
from dynlora_fn._core._check_trees import check_params
from dynlora_fn._core._stacking import unstacked
from dynlora_fn._core._torch import own_parametrization_cache
from dynlora_fn._core._tree import tensor_of
from dynlora_fn._core._types import LowRank, Param, Params
from dynlora_fn.bases._base import as_base
from dynlora_fn.bases._flatten import refuse_differentiated
from dynlora_fn.nn._checkpoints import permitting_checkpoint
from dynlora_fn.nn._swap import Modules, Places, modules_of, places_of, refuse_assignment, swapped
from dynlora_fn.nn._turns import Caller, taking_turns
from dynlora_fn.nn._view import Fallback
from dynlora_fn.nn._weight import weight_of


def call(
    model: nn.Module, params: Params, *args: Any, fallback: Literal["dense", "raise"] = "dense", **kwargs: Any
) -> Any:
    """Run ``model(*args, **kwargs)`` with `params` in place of its parameters.

    The result is equal to the result with dense weights, to rounding. Each operation on a low-rank weight follows a
    rule (dynlora_fn/nn/README.md).

    After the call, also after an error, the model has its parameters again. The model uses its buffers, and values that
    it writes to them stay, as when it is called directly. Threads that call the same model take turns.

    Args:
        model: Any module.
        params: Every parameter of the model by name, as `init` returns them. Tied parameters need only one of their
            names. Buffers are optional. A buffer in `params`, as `load_adapter` returns it, replaces the buffer of the
            model, and in-place changes by the model change the tensor in `params`.
        *args: The positional arguments of the model.
        fallback: What to do for an operation without a rule. "dense" passes the dense weight, through which gradients
            reach the factors, and warns once for each weight and operation. "raise" refuses the operation. If the model
            has an argument `fallback`, pass that by position.
        **kwargs: The keyword arguments of the model.

    Returns:
        The result of the model.

    Raises:
        TypeError: If `model` is not a module, or a parameter has a wrong type or dtype.
        RuntimeError: If `params` does not have a parameter of the model, or contains a name that the model does not
            have. Also if the model is called inside another model while another thread calls it.
        NotImplementedError: If a low-rank weight is changed in place, or is used in an operation without a rule with
            ``fallback="raise"``; the message names both. If a base that is sharded or in low precision is
            differentiated. If the model assigns a parameter in its forward pass, or a buffer under `torch.func` or
            `torch.compile`. If the model returns a generator, which would run later with the model's parameters.
        ValueError: If `fallback` is unknown, or a weight does not fit the shape of its parameter. If two names of a
            tied parameter have different weights. If the model or a submodule is a `ScriptModule` or a wrapper for data
            parallelism, whose gradient hooks would not run.

    Example:
        >>> import torch
        >>> import dynlora_fn as dl
        >>> model, x = nn.Linear(6, 4), torch.ones(3, 6)
        >>> params = dl.init(model, rank=2, seed=0, targets=["weight"])
        >>> dense = torch.func.functional_call(model, dl.materialize(params), x)
        >>> torch.allclose(call(model, params, x), dense, atol=1e-6)
        True
    """
    check_module("model", model)
    check_params("params", params)
    check_choice("fallback", fallback, ("dense", "raise"))
    modules = modules_of(model)
    if problem := _problem_of(modules):
        raise ValueError(problem)
    return call_with(model, params, {}, args, kwargs, fallback=fallback, modules=modules)


def call_with(
    model: nn.Module,
    params: Params,
    buffers: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    fallback: Fallback,
    caller: Caller | None = None,
    modules: Modules | None = None,
) -> Any:
    """Run `call` with checked arguments, and with `buffers` in place of the model's.

    See `taking_turns` for `caller`. `modules` are the modules of the model, if the caller has found them.
    """
    modules = modules_of(model) if modules is None else modules
    for name, param in params.items():
        if isinstance(param, LowRank) and not isinstance(param.base, Tensor):
            layout, tensors = as_base(as_base(param.base).folded).flatten()
            refuse_differentiated(layout, tensors, f"the base of {name!r} in `params`")
    if torch.compiler.is_dynamo_compiling():
        return _call_traced(model, modules, {**buffers, **unstacked(params)}, args, kwargs, fallback)
    with taking_turns(model, caller), permitting_checkpoint(), own_parametrization_cache():
        places = places_of(modules)  # here, because another thread may have replaced the tensors before
        with swapped(places.slots, _tensors_for(model, places, {**buffers, **unstacked(params)}, fallback)):
            result = model(*args, **kwargs)
    if isinstance(result, GeneratorType | CoroutineType | AsyncGeneratorType):
        raise NotImplementedError(
            f"`model` returns a {type(result).__name__}, which would run with the parameters of the model instead of "
            "`params`; return tensors from its forward pass"
        )
    return result


def _call_traced(
    model: nn.Module,
    modules: Modules,
    params: Params,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    fallback: Fallback,
) -> Any:
    """Run `call_with` while Dynamo traces it.

    Dynamo cannot trace `swapped`, and `functional_call` has many more instructions.
    """
    places = places_of(modules)
    tensors = _tensors_for(model, places, params, fallback)
    placed = [slot for slot in places.slots if slot.name in tensors]
    try:
        for slot in placed:
            slot.put(tensors[slot.name])
        result = model(*args, **kwargs)
        refused = [slot for slot in places.slots if slot.now is not tensors.get(slot.name, slot.tensor)]
    finally:
        for slot in placed:
            slot.put(slot.tensor)
    if refused:
        refuse_assignment(refused[0])
    return result


def _tensors_for(model: nn.Module, places: Places, params: Params, fallback: Fallback) -> dict[str, Tensor]:
    """Return the tensor for each slot of a parameter or buffer that is in `params`.

    Tied parameters share one tensor, and `params` may have any of their names.
    """
    slots, named = places
    given: dict[Tensor, tuple[str, Param]] = {}
    tensors: dict[Tensor | None, Tensor] = {}
    for name, param in params.items():
        if name not in named:
            continue
        other, other_param = given.setdefault(named[name], (name, param))
        if other_param is not param:
            raise ValueError(
                f"`params` has different weights for {other!r} and {name!r}, which are tied; pass only one"
            )
        tensors[named[name]] = _tensor_for(name, param, named[name], fallback)
    unexpected = [name for name in params if name not in named]
    missing = [slot.name for slot in slots if not slot.is_buffer and slot.tensor not in tensors]
    if unexpected or missing:
        extra = f"Unexpected key(s): {', '.join(map(repr, unexpected))}. " if unexpected else ""
        lacking = f"Missing key(s): {', '.join(map(repr, missing))}. " if missing else ""
        raise RuntimeError(
            f"`params` does not fit {type(model).__name__}: {extra}{lacking}Make `params` from this model"
        )
    return {slot.name: tensors[slot.tensor] for slot in slots if slot.tensor in tensors}


def _tensor_for(name: str, param: Param, like: Tensor, fallback: Fallback) -> Tensor:
    if isinstance(param, LowRank):
        return weight_of(name, param, like, fallback)
    tensor = tensor_of(param)
    if tensor.shape != like.shape:
        raise ValueError(
            f"`params` has shape {tuple(tensor.shape)} for {name!r}, which does not fit the parameter's shape "
            f"{tuple(like.shape)}; make `params` from this model"
        )
    return tensor


def _problem_of(modules: Modules) -> str | None:
    """Return the error message if a model's parameters cannot be replaced, or None.

    DDP, FSDP and `DataParallel` reduce gradients in autograd hooks on the parameters of the module, which `call` does
    not use.
    """
    if not torch.compiler.is_dynamo_compiling() and not any(map(_wrapper_of, {type(module) for _, module in modules})):
        return None
    for name, module in modules:
        kind = _wrapper_of(type(module))
        if kind is None:
            continue
        where = f"submodule {name!r} of `model`" if name else "`model`"
        if kind != "ScriptModule":
            return (
                f"{where} is wrapped in {kind}, whose gradient hooks do not run here, so that replicas would drift "
                "apart; pass the unwrapped module, reduce gradients with `all_reduce_mean` and shard bases with `shard`"
            )
        if any(True for _ in module.parameters()):
            return f"{where} is a ScriptModule, whose parameters cannot be replaced; pass the module before scripting"
    return None


_KINDS: WeakKeyDictionary[type, str | None] = WeakKeyDictionary()


# Dynamo cannot read the base classes of modules that it does not trace into (`allow_in_graph`).
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _wrapper_of(module_type: type) -> str | None:
    """Return which wrapper a type of modules is or inherits from, or None.

    The result for each type is cached.
    """
    if module_type not in _KINDS:
        names = [base.__name__ for base in module_type.__mro__ if base.__module__.startswith("torch.")]
        is_script = issubclass(module_type, torch.jit.ScriptModule)
        wrappers = ["ScriptModule"] if is_script else [name for name in names if name in _WRAPPERS]
        _KINDS[module_type] = wrappers[0] if wrappers else None
    return _KINDS[module_type]


_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule")
