"""Tell whether `torch.func` differentiates, or autograd does in its place.

Autograd then refuses what `torch.func` refuses.
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
    """Refuse what `torch.func` refuses, while autograd computes in its place.

    A checkpoint is recomputed after `call` has put the parameters of the model back, so its gradient would be wrong.
    """
    token = _IN_PLACE_OF_FUNC.set(True)
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(_NO_HOOKS):
            yield
    finally:
        _IN_PLACE_OF_FUNC.reset(token)


def is_in_place_of_func() -> bool:
    """Return whether autograd is running in place of `torch.func`.

    While Dynamo traces, it is not.
    """
    return not torch.compiler.is_dynamo_compiling() and _IN_PLACE_OF_FUNC.get()


def is_in_func() -> bool:
    """Return whether a transform of `torch.func` is running, or autograd in its place."""
    return is_transformed() or is_in_place_of_func()
