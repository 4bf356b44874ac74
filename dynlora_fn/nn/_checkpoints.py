"""Tell whether `torch.utils.checkpoint` would recompute with other parameters."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from dynlora_fn._core._torch import saved_tensor_hooks

_PERMITTED: ContextVar[Any] = ContextVar("_PERMITTED", default=None)


@contextmanager
def permitting_checkpoint() -> Iterator[None]:
    """Accept the checkpoint that is running.

    It recomputes all of a call, or with the parameters of the call.
    """
    token = _PERMITTED.set(_running_checkpoint())
    try:
        yield
    finally:
        _PERMITTED.reset(token)


def is_in_other_checkpoint() -> bool:
    """Return whether a checkpoint is running that is not permitted.

    It recomputes after `call` has returned, with the parameters that the model has then.
    """
    checkpoint = _running_checkpoint()
    return checkpoint is not None and checkpoint is not _PERMITTED.get()


def _running_checkpoint() -> Any:
    """Return the hook of the innermost checkpoint, or None."""
    hooks = saved_tensor_hooks(True)
    is_checkpoint = hooks is not None and hooks[0].__qualname__.startswith("_checkpoint_hook.")
    return hooks[0] if is_checkpoint and hooks is not None else None
