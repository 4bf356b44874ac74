"""The parameters of a model, with tied parameters once, and which are frozen."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dynlora_fn._core._attached import is_attached
from dynlora_fn._core._torch import is_of_transform
from dynlora_fn._core._tree import inner_tensors
from dynlora_fn._core._types import FrozenTensor as FrozenTensor  # noqa: PLC0414, `interop` exports it
from dynlora_fn.bases._torchao_tensors import is_torchao


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
        ValueError: If a parameter has no shape yet, or has the gradient of other tensors.
    """
    named = dict(model.named_parameters(remove_duplicate=False)) if isinstance(model, nn.Module) else dict(model)
    parameters, frozen = Parameters({}, {}, frozenset()), set[str]()
    first_names: dict[object, str] = {}
    for name, tensor in named.items():
        if is_lazy(tensor):
            raise ValueError(f"`model` has no shape for {name!r} yet; run its first forward pass, which sets the shape")
        is_frozen = _is_frozen(tensor)
        leaf = tensor if is_frozen and is_opaque(tensor) else detached("model", name, tensor)
        first = first_names.setdefault(_identity(tensor), name)
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
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return id(tensor)
    memory = inner_tensors(tensor)[0]  # a tensor of torchao has no memory itself
    return memory.data_ptr(), memory.stride(), tensor.shape, tensor.device
