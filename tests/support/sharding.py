"""A network whose bases are sharded, and a counter of gathered bytes."""

import time
import weakref

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dynlora_fn as dl


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(18, 18), nn.GELU()) for _ in range(3)]
    return nn.Sequential(*layers, nn.Linear(18, 3))  # on four processes 5, 5, 5 and 3 rows, and 1, 1, 1 and none


NET = net()


def fresh(base, residual) -> dict:
    return dl.init(NET, rank=2, seed=0, targets=["*.weight"], base=base, residual=residual)


def bits(tree) -> list[bytes]:
    return [leaf.contiguous().flatten().view(torch.uint8).numpy().tobytes() for leaf in tree_leaves(tree)]


def bytes_of(tree) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree))


class Gathered(TorchDispatchMode):
    """Counts the bytes that are gathered, and the most of them at once.

    They are in memory at once. A thread of gloo releases a result some time after it is complete. Bytes beyond `room`
    are therefore counted again for up to a second. What the program itself references is still alive then.
    """

    def __init__(self, room: float = float("inf")):
        super().__init__()
        self.room = room
        self.total = self.most = self.scattered = 0
        self._alive: dict[int, tuple[weakref.ref, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        self.scattered += "reduce_scatter" in name
        if "all_gather_into_tensor" in name:
            self.note(result)
        return result

    def note(self, result: torch.Tensor) -> None:
        size = result.numel() * result.element_size()
        self.total += size
        storage = result.untyped_storage()
        until = time.monotonic() + 1
        while self._live_bytes() + size > self.room and time.monotonic() < until:
            time.sleep(0.001)
        self.most = max(self.most, self._live_bytes() + size)
        self._alive[storage.data_ptr()] = weakref.ref(storage), size

    def _live_bytes(self) -> int:
        self._alive = {at: pair for at, pair in self._alive.items() if pair[0]() is not None}
        return sum(size for _, size in self._alive.values())
