"""Replace parameters and buffers of a module, and restore them afterwards."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Never, TypeAlias

from torch import Tensor, nn

from dynlora_fn._core._func_scope import is_in_place_of_func
from dynlora_fn._core._torch import is_of_transform

_PLACED_BUFFERS: ContextVar[tuple[Tensor, ...]] = ContextVar("_PLACED_BUFFERS", default=())


def is_placed_buffer(tensor: Tensor) -> bool:
    """Return whether a running call has put this tensor in place of a buffer."""
    return any(tensor is placed for placed in _PLACED_BUFFERS.get())


class Slot(NamedTuple):
    """A place of a parameter or buffer in a module, with the tensor found there.

    A buffer may have no tensor yet, because the model assigns it in its first call.

    A module at two paths of a model has each slot once, under its first path.
    """

    name: str  # in the model
    module: nn.Module
    key: str
    tensor: Tensor | None
    is_buffer: bool

    @property
    def now(self) -> Tensor | None:
        """The tensor that is in this slot now, or None."""
        return self._places.get(self.key)

    @property
    def _places(self) -> dict[str, Any]:
        return self.module._buffers if self.is_buffer else self.module._parameters

    def put(self, tensor: Tensor | None) -> None:
        """Put a tensor in this slot."""
        self._places[self.key] = tensor
        if isinstance(self.module, nn.RNNBase) and isinstance(tensor, nn.Parameter):
            setattr(self.module, self.key, tensor)  # RNNBase also updates its list of weights


Modules: TypeAlias = Sequence[tuple[str, nn.Module]]


def modules_of(model: nn.Module) -> Modules:
    """Return the modules of a model with their paths, each under all of its paths."""
    return list(model.named_modules(remove_duplicate=False))


class Places(NamedTuple):
    """Where the parameters and buffers of a model are."""

    slots: list[Slot]
    names: dict[str, Tensor]  # parameters and buffers by name, tied tensors under each of their names


def places_of(modules: Modules) -> Places:
    """Find all parameters and buffers of modules.

    This takes only one walk, because Dynamo traces it for each call.
    """
    slots: list[Slot] = []
    names: dict[str, Tensor] = {}
    visited: set[nn.Module] = set()
    for path, module in modules:
        prefix = f"{path}." if path else ""
        is_first = module not in visited
        visited.add(module)
        for key, parameter in module._parameters.items():
            if parameter is not None:
                names[prefix + key] = parameter
                if is_first:
                    slots.append(Slot(prefix + key, module, key, parameter, False))
        for key, buffer in module._buffers.items():
            if buffer is not None:
                names[prefix + key] = buffer
            if is_first:
                slots.append(Slot(prefix + key, module, key, buffer, True))
    return Places(slots, names)


def slots_of(model: nn.Module) -> list[Slot]:
    """Return the slots of all parameters and buffers in a model."""
    return places_of(modules_of(model)).slots


@contextmanager
def swapped(slots: Sequence[Slot], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Put `tensors` by name into a model, and restore its tensors at the end.

    They are also restored after an error. A buffer that the model itself assigns stays, as when the model is called
    directly.

    Raises:
        NotImplementedError: If the model replaces one of `tensors`. Under `torch.func`, or autograd in place of it,
            also if the model assigns a buffer, or writes a value with a gradient into a buffer. The slot is restored.
    """
    refused: list[Slot] = []
    buffers = {
        slot.name: tensors.get(slot.name, slot.tensor) for slot in slots if slot.is_buffer and slot.tensor is not None
    }
    attached = {name for name, buffer in buffers.items() if buffer.requires_grad}
    token = _PLACED_BUFFERS.set((*_PLACED_BUFFERS.get(), *(buffers[name] for name in buffers if name in tensors)))
    modules = {slot.module for slot in slots if isinstance(slot.module, nn.RNNBase)}
    recurrent = [module for module in modules if "flatten_parameters" not in module.__dict__]  # not in an outer call
    try:
        for module in recurrent:
            module.__dict__["flatten_parameters"] = _keep_memory
        for slot in slots:
            if slot.name in tensors:
                slot.put(tensors[slot.name])
        yield
    finally:
        for module in recurrent:
            module.__dict__.pop("flatten_parameters", None)
        _PLACED_BUFFERS.reset(token)
        refused = [slot for slot in slots if _is_refused(slot, tensors.get(slot.name))]
        for slot in slots:
            if slot.name in tensors or slot in refused:
                slot.put(slot.tensor)
    if refused:
        refuse_assignment(refused[0])
    for name, buffer in buffers.items() if is_in_place_of_func() else ():
        if buffer.requires_grad and name not in attached:
            buffer.detach_()
            raise NotImplementedError(
                f"`model` writes a value that requires a gradient into the buffer {name!r}; `detach()` the value"
            )


def _keep_memory() -> None:
    """Replace `flatten_parameters` of a recurrent layer during a call.

    For cuDNN it moves the tensors of the layer into one memory, which must not happen to tensors that were passed. A
    low-rank weight has no memory.
    """


def _is_refused(slot: Slot, placed: Tensor | None) -> bool:
    """Return whether the model has assigned a tensor to this slot that cannot stay."""
    now = slot.now
    if placed is not None:
        return now is not placed
    if now is None or now is slot.tensor:
        return False
    # A model may fill a buffer that has no tensor yet, such as a cache. But a graph or a transform must not stay in it.
    is_lost = is_in_place_of_func() and (slot.tensor is not None or now.requires_grad)
    return is_lost or is_of_transform(now)


def refuse_assignment(slot: Slot) -> Never:
    """Raise for a tensor that a model assigns to a slot, and that would be lost."""
    if slot.is_buffer:
        raise NotImplementedError(
            f"`model` assigns the buffer {slot.name!r} in its forward pass, which `torch.func`, `torch.compile` and "
            "`remat` do not keep; write its values in place (`copy_`) with `value_and_grad(..., via='autograd')`, "
            "call `model.eval()` if only training assigns it, or fill a cache by one call of the model before"
        )
    raise NotImplementedError(
        f"`model` assigns the parameter {slot.name!r} in its forward pass, which would be lost; "
        "make it a buffer, or compute it under another name"
    )
