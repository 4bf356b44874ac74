"""Convert parameters to the state dict of their model."""

from functools import partial

import torch
from torch import Tensor, nn

from dynlora_fn._core._check import check_module, first_names
from dynlora_fn._core._dtypes import widest
from dynlora_fn._core._stacking import unstack
from dynlora_fn._core._tree import tensor_of
from dynlora_fn._core._types import LowRank, Param, Params
from dynlora_fn.bases._base import as_base
from dynlora_fn.interop._lazy import LazyTensor, lazy
from dynlora_fn.nn._view import View, dense, view_of


def state_dict(model: nn.Module, params: Params) -> dict[str, Tensor]:
    """Return the state dict that ``model.load_state_dict`` takes.

    Every weight is dense, in the shape and dtype of the model's parameter, and under all of its names. Tied weights are
    one tensor. A buffer comes from `params` if it is there, as after `load_adapter`, and from the model otherwise. Only
    the buffers of the model share memory with it, so the result keeps its values when a step overwrites its state.

    Args:
        model: The model. Only names, shapes, dtypes and buffers are read. Its parameters may be on the meta device.
        params: The parameters, as for `call`.

    Returns:
        The tensors by name.

    Raises:
        TypeError: If `model` is not a module, or a parameter has another kind than the model's: integer, real or
            complex.
        ValueError: If a parameter is missing, unknown to the model, or of another shape. The message gives the name and
            both shapes. Also if the model has extra state that is not a tensor, two names of a tied parameter have
            different weights, or a hook of the model puts other tensors in the place of its parameters.

    Numerics: A weight is computed in the wider dtype of base and factors, at least float32, and rounded once to the
    dtype of the model.

    Example:
        >>> import dynlora_fn as dl
        >>> model = nn.Linear(6, 4)
        >>> params = dl.init(model, rank=2, seed=0, targets=["weight"])
        >>> model.load_state_dict(state_dict(model, params))
        <All keys matched successfully>
    """
    weights = lazy_state_dict(model, params, copy=True)
    tensors = {key: weight.read() for key, weight in {id(weight): weight for weight in weights.values()}.items()}
    return {name: tensors[id(weight)] for name, weight in weights.items()}


def lazy_state_dict(model: nn.Module, params: Params, *, copy: bool = False) -> dict[str, LazyTensor]:
    """Return the state dict of a model, with weights that are computed when read.

    With `copy`, a full-rank parameter is copied when it is read. Otherwise it may share memory with `params`.

    Tied weights are one lazy tensor. All errors of `state_dict` are raised here, and not when a weight is read.
    """
    check_module("model", model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = {**parameters, **dict(model.named_buffers(remove_duplicate=False))}
    weights: dict[int, LazyTensor] = {}
    given: dict[int, tuple[str, Param]] = {}
    params = unstack(params)
    _check_data(params)
    for name, param in params.items():
        if name not in tensors:
            raise ValueError(f"`params` has {name!r}, which the model does not have; make `params` from this model")
        first, first_param = given.setdefault(id(tensors[name]), (name, param))
        if first_param is not param:
            raise ValueError(
                f"`params` has different weights for {first!r} and {name!r}, which are tied; pass only one"
            )
        weights[id(tensors[name])] = _lazy_weight(name, param, tensors[name], copy=copy)
    for name, parameter in parameters.items():
        if id(parameter) not in weights:
            raise ValueError(
                f"`params` has no {name!r} of shape {tuple(parameter.shape)}; pass every parameter of the model"
            )
    leaves = model.state_dict(keep_vars=True)
    if other := [name for name, leaf in leaves.items() if not isinstance(leaf, Tensor)]:
        raise ValueError(f"`model` has the extra state {first_names(other)}, which is not a tensor; save it apart")
    known, saved = set(map(id, tensors.values())), set(map(id, leaves.values()))
    lost = [name for name, parameter in parameters.items() if id(parameter) not in saved]
    others = [name for name, leaf in leaves.items() if id(leaf) not in known]
    if lost and others:
        raise ValueError(
            f"`model` has a `state_dict` without its {first_names(lost)}, but with the tensors {first_names(others)},"
            " so that what was trained would be lost; remove the hook or the method that replaces the parameters"
        )
    return {name: weights[id(leaf)] if id(leaf) in weights else lazy(leaf) for name, leaf in leaves.items()}


def _check_data(params: Params) -> None:
    """Raise ValueError if some parameters have data, and others are on meta."""
    tensors = [param.factors.b if isinstance(param, LowRank) else tensor_of(param) for param in params.values()]
    on_meta = [name for name, tensor in zip(params, tensors, strict=True) if tensor.is_meta]
    if 0 < len(on_meta) < len(params):
        raise ValueError(
            f"`params` has {first_names(on_meta)} on meta, but other parameters have data; load the data first"
        )


def _lazy_weight(name: str, param: Param, parameter: Tensor, *, copy: bool) -> LazyTensor:
    shape, dtype = tuple(parameter.shape), parameter.dtype
    weight = view_of(name, param, shape) if isinstance(param, LowRank) else tensor_of(param)
    found = _dense_dtype(weight.parts[0]) if isinstance(weight, View) else weight.dtype
    if tuple(weight.shape) != shape:
        raise ValueError(
            f"`params` has shape {tuple(weight.shape)} for {name!r}, but the model has {shape}; "
            "make `params` from this model"
        )
    if found.is_complex != dtype.is_complex or found.is_floating_point != dtype.is_floating_point:
        raise TypeError(f"`params` has dtype {found} for {name!r}, but the model has {dtype}; convert it first")
    return LazyTensor(shape, dtype, partial(_formed, name, param, shape, dtype, copy=copy))


def _dense_dtype(param: LowRank) -> torch.dtype:
    """Return the dtype of the weight that `materialize` returns."""
    return widest(param.factors.b.dtype, as_base(param.base).sum_dtype)


def _formed(name: str, param: Param, shape: tuple[int, ...], dtype: torch.dtype, *, copy: bool) -> Tensor:
    if isinstance(param, LowRank):
        return dense(view_of(name, param, shape)).to(dtype)
    return tensor_of(param).to(dtype, copy=copy)
