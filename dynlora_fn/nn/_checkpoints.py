"""`checkpoint_contexts`: let `torch.utils.checkpoint` use parameters of a call."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from dynlora_fn._core._check import check_module
from dynlora_fn._core._torch import running_checkpoint
from dynlora_fn.nn._swap import is_placed_buffer, slots_of, swapped
from dynlora_fn.nn._turns import current_caller, taking_turns

_PERMITTED: ContextVar[Any] = ContextVar("_PERMITTED", default=None)


@contextmanager
def permitting_checkpoint() -> Iterator[None]:
    """Accept the checkpoint that is running.

    It recomputes all of a call, or with the parameters of the call.
    """
    token = _PERMITTED.set(running_checkpoint())
    try:
        yield
    finally:
        _PERMITTED.reset(token)


def is_in_other_checkpoint() -> bool:
    """Return whether a checkpoint is running that is not permitted.

    It recomputes after `call` has returned, with the parameters that the model has then.
    """
    checkpoint = running_checkpoint()
    return checkpoint is not None and checkpoint is not _PERMITTED.get()


def checkpoint_contexts(model: nn.Module) -> Callable[[], tuple[AbstractContextManager[None], ...]]:
    """Return the `context_fn` of `torch.utils.checkpoint` for a model under `call`.

    With this `context_fn`, recomputed blocks use the parameters of the call. Otherwise a checkpoint recomputes its
    block after `call` has returned, with the original parameters of the module. A low-rank weight in such a block is
    refused. A block that has only full-rank weights gets a wrong gradient, without an error.

    For Hugging Face models, under ``value_and_grad(..., via="autograd")``::

        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": dl.checkpoint_contexts(model)})

    `remat` does not need this, and also works under `torch.func` and in compiled steps.

    Args:
        model: The model that is passed to `call`.

    Returns:
        A function that returns the contexts for the forward pass and for the recomputation.

    Raises:
        TypeError: If `model` is not a module.

    Example:
        >>> len(checkpoint_contexts(nn.Linear(4, 4))())
        2
    """
    check_module("model", model)

    def contexts() -> tuple[AbstractContextManager[None], ...]:
        return permitting_checkpoint(), _recomputation(model)

    return contexts


def _recomputation(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which the model has its current parameters again.

    This includes buffers that were passed to `call`. Other buffers are those of the model, with their later values.
    """
    parameters = {
        slot.name: slot.tensor
        for slot in slots_of(model)
        if slot.tensor is not None and (not slot.is_buffer or is_placed_buffer(slot.tensor))
    }
    caller = current_caller()

    @contextmanager
    def context() -> Iterator[None]:
        with taking_turns(model, caller), swapped(slots_of(model), parameters):
            yield

    return context()
