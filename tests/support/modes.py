"""A dispatch mode that changes nothing.

Under it, functions take the way that they take while they are traced.
"""

from torch.utils._python_dispatch import TorchDispatchMode


class PlainMode(TorchDispatchMode):
    """Run every operation unchanged."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))
