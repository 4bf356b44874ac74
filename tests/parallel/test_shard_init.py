"""Parameters are made in shards, one weight at a time."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dynlora_fn as dl
from tests.support.processes import in_processes
from tests.support.sharding import bits


class Read(dict):
    """Reads weights one by one, and records the largest storage that is left of earlier reads."""

    def __init__(self, weights, allocations: "Allocations"):
        super().__init__({name: weight.detach() for name, weight in weights.items()})
        self.allocations, self.left = allocations, []

    def __getitem__(self, name):
        self.left.append(self.allocations.largest())
        return super().__getitem__(name).clone()


class Allocations(TorchDispatchMode):
    """Records the storages that operations allocate, to find the largest that is alive."""

    def __init__(self):
        super().__init__()
        self._storages: list[weakref.ref] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        real = [leaf for leaf in tree_leaves(result) if torch.is_tensor(leaf) and not leaf.is_meta]
        self._storages += [weakref.ref(leaf.untyped_storage()) for leaf in real]
        return result

    def largest(self) -> int:
        return max((storage.nbytes() for ref in self._storages if (storage := ref()) is not None), default=0)


def _init_in_shards(base, residual) -> None:
    group = torch.distributed.group.WORLD
    options = {"rank": 2, "seed": 0, "targets": ["*.weight"], "base": base, "residual": residual}
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(3)), nn.Linear(64, 3))
    with torch.device("meta"):
        empty = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(3)), nn.Linear(64, 3))
    allocations = Allocations()
    weights = Read(dict(model.named_parameters()), allocations)
    with allocations:
        params = dl.init(empty, weights=weights, **options, group=group)
    assert len(weights.left) == len(weights)
    weight_bytes = 64 * 64 * 4
    assert 0 < max(weights.left[1:3]) <= weight_bytes / 4  # the rows of one weight, of three that make a stack
    assert max(weights.left) <= 3 * weight_bytes / 4  # of all three
    expected = dl.parallel.shard(dl.init(model, **options), group)
    assert expected.keys() == params.keys()
    assert bits(params) == bits(expected)
    assert bits(dl.parallel.unshard(params)) == bits(dl.init(model, **options))


@pytest.mark.parametrize(("base", "residual"), [(None, None), ("int8", "bfloat16")])
def test_parameters_are_made_in_shards_one_weight_at_a_time(base, residual):
    in_processes(4, _init_in_shards, base, residual)
