"""The collectives that a function calls."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):
    """Counts collectives, and the bytes that are reduced or gathered."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if func.namespace.startswith("_c10d_functional") and "wait" not in name and "wrap" not in name:
            self.calls[name] += 1
            self.bytes[name] += result.numel() * result.element_size()
        return result
