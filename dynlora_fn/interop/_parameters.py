"""The parameters of a model, with tied parameters once, and which are frozen."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dynlora_fn._core._attached import is_attached
from dynlora_fn._core._torch import FakeTensor, is_of_transform, is_traceable_wrapper_subclass
from dynlora_fn._core._tree import inner_tensors
from dynlora_fn._core._types import FrozenTensor as FrozenTensor  # noqa: PLC0414, `interop` exports it
from dynlora_fn.bases._torchao_tensors import is_torchao
from dynlora_fn.interop._arguments import check_kind


class Parameters(NamedTuple):
    """The parameters of a model, with tied parameters under their first name."""

    tensors: dict[str, Tensor]  # detached, except a frozen tensor of another library
    aliases: dict[str, list[str]]  # all names of each parameter, the first name included
    frozen: frozenset[str]  # the names of parameters that are not trained


def parameters_of(model: nn.Module | Mapping[str, Tensor]) -> Parameters:
    """Return the parameters of a module, or of a dict of tensors.

    An `nn.Parameter` with ``requires_grad=False`` is frozen, and so is a tensor of integers. A plain floating tensor in
    a dict is not frozen, because it has no such setting.

    Raises:
        TypeError: If a parameter is of a subclass of tensors that stores several, and is no tensor of torchao.
        ValueError: If a parameter has no shape yet, is sparse, or has the gradient of other tensors. Also if two
            parameters of a module are different objects in the same memory.
    """
    is_module = isinstance(model, nn.Module)
    named = dict(model.named_parameters(remove_duplicate=False)) if isinstance(model, nn.Module) else dict(model)
    parameters, frozen = Parameters({}, {}, frozenset()), set[str]()
    first_names: dict[object, str] = {}
    for name, tensor in named.items():
        if is_lazy(tensor):
            raise ValueError(f"`model` has no shape for {name!r} yet; run its first forward pass, which sets the shape")
        if tensor.layout != torch.strided:
            raise ValueError(f"`model` has {name!r} of layout {tensor.layout}; use a dense tensor")
        is_frozen = _is_frozen(tensor)
        if not is_frozen and is_traceable_wrapper_subclass(tensor) and not is_torchao(tensor):
            raise TypeError(
                f"`model` has a {type(tensor).__name__} as {name!r}, which `init` does not know; use a dense tensor, "
                "such as `full_tensor()` of a DTensor"
            )
        leaf = tensor if is_frozen and is_opaque(tensor) else detached("model", name, tensor)
        first = first_names.setdefault(_identity(tensor), name)
        if is_module and named[first] is not tensor:
            raise ValueError(
                f"`model` has two parameters in the same memory, {first!r} and {name!r}; assign one parameter to both "
                "places, which ties them, or copy one of them"
            )
        parameters.aliases.setdefault(first, []).append(name)
        if first == name:
            parameters.tensors[name] = leaf
            frozen |= {name} if is_frozen else set()
    return parameters._replace(frozen=frozenset(frozen))


def detached(argument: str, name: str, tensor: Tensor) -> Tensor:
    """Return a detached tensor. Only a leaf of autograd may require a gradient.

    Raises:
        ValueError: If detaching would lose the gradient of another tensor, or a tangent.
    """
    is_leaf = tensor.grad_fn is None and tensor.requires_grad and not is_of_transform(tensor)
    if is_attached(tensor) and not is_leaf:
        raise ValueError(
            f"`{argument}` has {name!r} with a tangent or with the gradient of other tensors, which does not pass"
            " through `init`; detach it"
        )
    return tensor.detach()


def _is_frozen(tensor: Tensor) -> bool:
    is_number = tensor.is_floating_point() or tensor.is_complex()
    return not is_number or (isinstance(tensor, nn.Parameter) and not tensor.requires_grad)


def is_opaque(tensor: Tensor) -> bool:
    """Return whether a tensor has a type of another library than torch and torchao.

    A copy may lose attributes of such a tensor.
    """
    return type(tensor) not in (Tensor, nn.Parameter) and not is_torchao(tensor)


def _identity(tensor: Tensor) -> object:
    """Return a key that is equal for tied parameters."""
    has_values = tensor.numel() > 0 and tensor.device.type != "meta"
    if not has_values or isinstance(tensor, FakeTensor) or is_of_transform(tensor):
        return id(tensor)  # it has no address
    memory = inner_tensors(tensor)[0]  # a tensor of torchao has no memory itself
    values = memory.dtype, memory.is_conj(), memory.is_neg()  # others are read from the same memory
    return memory.data_ptr(), memory.stride(), tensor.shape, tensor.device, *values


def read_weight(weights: Mapping[str, Tensor], parameters: Parameters, name: str) -> Tensor:
    """Return one of `weights`, under whichever name of a tied parameter it has there.

    Raises:
        TypeError: If it is integer, real or complex where the parameter is not.
        ValueError: If it is missing or has another shape, or two names of a tied parameter have different values.
    """
    like = parameters.tensors[name]
    names = [alias for alias in parameters.aliases[name] if alias in weights]
    if not names:
        raise ValueError(f"`weights` has no {name!r} of shape {tuple(like.shape)}; pass every parameter of the model")
    weight = _checked(weights, names[0], like)
    for other in names[1:]:
        if not _is_equal(weight, _checked(weights, other, like)):
            raise ValueError(
                f"`weights` has different values for {names[0]!r} and {other!r}, which are tied in the model; pass one "
                "of them, or untie them in the model"
            )
    return weight


def _is_equal(weight: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have equal values.

    Those of torchao are not compared.
    """
    if is_torchao(weight) or is_torchao(other) or weight.data_ptr() == other.data_ptr():
        return True
    return torch.equal(weight, other.to(weight))


def _checked(weights: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    """Return one of `weights`, which must be like a tensor of the model."""
    weight = weights[name]
    check_kind(name, weight, like)
    if tuple(weight.shape) != tuple(like.shape):
        raise ValueError(
            f"`weights` has shape {tuple(weight.shape)} for {name!r}, but the model has {tuple(like.shape)}; "
            "pass the weights of this model"
        )
    return detached("weights", name, weight)


def changed_buffers(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, FrozenTensor]:
    """Return copies of the buffers that `weights` changes, by their first names.

    Only buffers that the model saves are read.
    """
    buffers: dict[int, tuple[str, Tensor]] = {}
    values: dict[str, FrozenTensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for key, buffer in module._buffers.items():
            name = f"{path}.{key}" if path else key
            if buffer is None or key in module._non_persistent_buffers_set:
                continue
            first, _ = buffers.setdefault(id(buffer), (name, buffer))
            if name in weights and first not in values:
                value = _checked(weights, name, buffer)
                device = value.device if buffer.is_meta else buffer.device
                value = value.to(device, buffer.dtype, copy=True)
                if buffer.is_meta or not torch.equal(value, buffer):
                    values[first] = FrozenTensor(value)
    return values
