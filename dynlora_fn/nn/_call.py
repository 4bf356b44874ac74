"""Run an unmodified module with low-rank weights in place of its dense ones."""

from collections.abc import Mapping, Sequence
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dynlora_fn._core._check import check_choice, check_module
from dynlora_fn._core._check_trees import check_params
from dynlora_fn._core._stacking import unstacked
from dynlora_fn._core._tree import tensor_of
from dynlora_fn._core._types import LowRank, Param, Params
from dynlora_fn.bases._base import as_base
from dynlora_fn.bases._flatten import refuse_differentiated
from dynlora_fn.nn._checkpoints import permitting_checkpoint
from dynlora_fn.nn._swap import Slot, names_of, refuse_assignment, slots_of, swapped
from dynlora_fn.nn._turns import Caller, taking_turns
from dynlora_fn.nn._view import Fallback
from dynlora_fn.nn._weight import weight_of


def call(
    model: nn.Module, params: Params, *args: Any, fallback: Literal["dense", "raise"] = "dense", **kwargs: Any
) -> Any:
    """Run ``model(*args, **kwargs)`` with `params` in place of its parameters.

    A low-rank weight is used by the rule of each operation (dynlora_fn/nn/README.md).

    The parameters of the model are put back afterwards, whatever happens. Its buffers are those of the model, so that
    what it writes to them stays, as when it is called directly. Threads that call the same model take turns.

    Args:
        model: Any module.
        params: Every parameter of the model by name, as `init` returns them. For tied parameters one name is enough.
            Buffers are taken from the model, except those in `params`, as `load_adapter` returns them. What the model
            writes to one of these in place is written into `params`.
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
            ``fallback="raise"``. The message names both. If a base in low precision or a sharded one is differentiated.
            If the model assigns a parameter in its forward pass, or a buffer under `torch.func` or `torch.compile`. If
            it returns a generator, which would run later with the parameters of the model.
        ValueError: If `fallback` is unknown, or a weight does not fit the shape of its parameter. If two names of a
            tied parameter have different weights. If the model or a submodule is a `ScriptModule`, or is wrapped for
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
    check_params("params", params)
    check_choice("fallback", fallback, ("dense", "raise"))
    if problem := _problem_of(model):
        raise ValueError(problem)
    return call_with(model, params, {}, args, kwargs, fallback=fallback)


def call_with(
    model: nn.Module,
    params: Params,
    buffers: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    fallback: Fallback,
    caller: Caller | None = None,
) -> Any:
    """Run `call` with `buffers` in place of the model's buffers.

    `caller` is as in `taking_turns`.
    """
    for name, param in params.items():
        if isinstance(param, LowRank) and not isinstance(param.base, Tensor):
            layout, tensors = as_base(as_base(param.base).folded).flatten()
            refuse_differentiated(layout, tensors, f"the base of {name!r} in `params`")
    if torch.compiler.is_dynamo_compiling():
        return _call_traced(model, {**buffers, **unstacked(params)}, args, kwargs, fallback)
    with taking_turns(model, caller), permitting_checkpoint():
        slots = slots_of(model)
        with swapped(slots, _tensors_for(model, slots, {**buffers, **unstacked(params)}, fallback)):
            result = model(*args, **kwargs)
    if isinstance(result, GeneratorType | CoroutineType | AsyncGeneratorType):
        raise NotImplementedError(
            f"`model` returns a {type(result).__name__}, which would run with the parameters of the model; "
            "return tensors from its forward pass"
        )
    return result


def _call_traced(
    model: nn.Module, params: Params, args: tuple[Any, ...], kwargs: Mapping[str, Any], fallback: Fallback
) -> Any:
    """Run `call_with` where Dynamo traces it.

    Dynamo knows that `functional_call` puts the parameters back.
    """
    slots = slots_of(model)
    tensors = _tensors_for(model, slots, params, fallback)
    result = functional_call(model, tensors, args, dict(kwargs), tie_weights=False)
    for slot in slots:
        if slot.now is not slot.tensor:
            refuse_assignment(slot)
    return result


def _tensors_for(model: nn.Module, slots: Sequence[Slot], params: Params, fallback: Fallback) -> dict[str, Tensor]:
    """Return the tensor for each slot of a parameter or a buffer in `params`.

    Tied parameters have one tensor. `params` may have any of their names.
    """
    named = names_of(model)
    given: dict[Tensor, tuple[str, Param]] = {}
    tensors: dict[Tensor, Tensor] = {}
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


def _problem_of(model: nn.Module) -> str | None:
    """Return why parameters cannot be replaced in a model, or None.

    The gradients of DDP, FSDP and `DataParallel` are reduced by autograd hooks on the module's parameters, and `call`
    uses neither.
    """
    for name, module in model.named_modules():
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
            return f"{where} is a ScriptModule, whose parameters cannot be replaced; pass the module from before"
    return None


_KINDS: WeakKeyDictionary[type, str | None] = WeakKeyDictionary()


# Dynamo cannot look at the bases of modules that it does not trace into (`allow_in_graph`).
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _wrapper_of(module_type: type) -> str | None:
    """Return the name of the wrapper that a type of modules is, or None.

    It is looked up once for each type.
    """
    if module_type not in _KINDS:
        names = [base.__name__ for base in module_type.__mro__ if base.__module__.startswith("torch.")]
        is_script = issubclass(module_type, torch.jit.ScriptModule)
        wrappers = ["ScriptModule"] if is_script else [name for name in names if name in _WRAPPERS]
        _KINDS[module_type] = wrappers[0] if wrappers else None
    return _KINDS[module_type]


_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule")
