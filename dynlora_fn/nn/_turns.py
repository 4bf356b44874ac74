"""Let threads that call the same model take turns.

They cannot run at the same time, because `call` replaces tensors in the modules of the model.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


class Caller:
    """An outermost call. Calls inside it and its recomputations have the same caller."""


_CHANGED = threading.Condition()
_CALLERS: dict[int, Caller] = {}  # the caller of a module, by the id of its dict of parameters, which copies may share
_THREAD = threading.local()


def current_caller() -> Caller | None:
    """Return the caller for which this thread runs a model, or None outside `call`."""
    return getattr(_THREAD, "caller", None)


@contextmanager
def taking_turns(model: nn.Module, caller: Caller | None = None) -> Iterator[None]:
    """Wait until other callers do not run any module of a model.

    Args:
        model: The model.
        caller: The caller whose forward pass is recomputed. Autograd may do this in another thread while the caller
            waits. Default None means the caller of this thread, or a new caller.

    Raises:
        RuntimeError: If this thread already runs another model, because two such threads could wait for each other.
    """
    outer = current_caller()
    caller = outer or caller or Caller()
    keys, entered = {id(module._parameters) for module in model.modules()}, set[int]()

    def is_free() -> bool:
        return all(_CALLERS.get(key, caller) is caller for key in keys)

    try:
        with _CHANGED:
            if outer and not is_free():
                raise RuntimeError(
                    f"another thread calls the same {type(model).__name__}, which is called inside another model here, "
                    "so both threads could wait forever; give each thread a copy of the model (`copy.deepcopy`)"
                )
            _CHANGED.wait_for(is_free)
            entered = keys - _CALLERS.keys()
            _CALLERS.update(dict.fromkeys(entered, caller))
        _THREAD.caller = caller
        yield
    finally:
        _THREAD.caller = outer
        with _CHANGED:
            for key in entered:
                del _CALLERS[key]
            _CHANGED.notify_all()
