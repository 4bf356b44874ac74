"""Detect whether `torch.func` is running, or autograd in place of it.

In place of `torch.func`, autograd must refuse the same programs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from dynlora_fn._core._torch import is_transformed

_IN_PLACE_OF_FUNC: ContextVar[bool] = ContextVar("_IN_PLACE_OF_FUNC", default=False)
_NO_HOOKS = (
    "`via` is 'func', which does not support saved-tensor hooks, such as those of `torch.utils.checkpoint`; use"
    " `remat`, or via='autograd', where checkpoints inside of `call` need `checkpoint_contexts`"
)


@contextmanager
def in_place_of_func() -> Iterator[None]:
    """Refuse saved-tensor hooks while autograd runs in place of `torch.func`.

    `torch.func` refuses them too. `torch.utils.checkpoint` uses such hooks. It would recompute a block after `call` has
    restored the parameters of the model, and the gradient would be wrong.
    """
    token = _IN_PLACE_OF_FUNC.set(True)
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(_NO_HOOKS):
            yield
    finally:
        _IN_PLACE_OF_FUNC.reset(token)


def is_in_place_of_func() -> bool:
    """Return whether autograd is running in place of `torch.func`.

    While Dynamo traces, the result is False.
    """
    return not torch.compiler.is_dynamo_compiling() and _IN_PLACE_OF_FUNC.get()


def is_in_func() -> bool:
    """Return whether `torch.func` is running, or autograd in place of it."""
    return is_transformed() or is_in_place_of_func()
