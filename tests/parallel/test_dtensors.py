"""What `as_dtensors` returns is saved, and loaded by any number of processes."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

import dynlora_fn as dl
from dynlora_fn.bases import Sharded
from dynlora_fn.parallel import ShardedFactors, Sharding
from dynlora_fn.testing import normal
from tests.support.processes import in_processes


def state_of(seed: int, base: str | None = None) -> dict:
    """Return a training state with sharded factors, or with sharded codes, whose values depend on the seed."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(18, 18), nn.Linear(18, 18), nn.Linear(18, 11))  # the first two are stacked
    params = dl.init(net, rank=3, seed=seed, targets=["*.weight"], base=base, start="lora")
    params = dl.parallel.shard(params, torch.distributed.group.WORLD)
    params = params if base else dl.parallel.shard_factors(params)
    trainable, frozen = dl.partition(params)
    optimizer = dl.optim.adamw()
    grads = tree_map(lambda leaf: normal(seed, *leaf.shape, dtype=leaf.dtype), trainable)
    _, opt_state = optimizer.update(grads, optimizer.init(trainable), trainable, lr=0.1)
    return {"trainable": trainable, "frozen": frozen, "opt_state": opt_state, "t": torch.tensor(seed), "pool": None}


def whole_of(state: dict) -> dict:
    placed = dl.parallel.as_dtensors(state)
    return {path: leaf.full_tensor() if hasattr(leaf, "full_tensor") else leaf for path, leaf in placed.items()}


def _save(folder: Path, base: str | None) -> dict:
    state = state_of(1, base)
    checkpoint.save(dl.parallel.as_dtensors(state), checkpoint_id=folder)
    return whole_of(state)


def _load(folder: Path, base: str | None) -> dict:
    state = state_of(2, base)
    checkpoint.load(dl.parallel.as_dtensors(state), checkpoint_id=folder)
    return whole_of(state)


@pytest.mark.parametrize("base", [None, "int8"])
def test_another_number_of_processes_loads_what_was_saved(tmp_path: Path, base: str | None):
    """Neither number divides the rows."""
    saved = in_processes(4, _save, tmp_path, base)
    loaded = in_processes(3, _load, tmp_path, base)
    for each in saved[1:] + loaded:
        assert each.keys() == saved[0].keys()
        assert all(torch.equal(each[path], saved[0][path]) for path in each)


def _paths() -> None:
    state = state_of(1)
    placed = dl.parallel.as_dtensors(state)
    tensors = {keystr(path): leaf for path, leaf in tree_flatten_with_path(state)[0] if isinstance(leaf, torch.Tensor)}
    assert placed.keys() == tensors.keys()
    is_shard = {path: hasattr(leaf, "to_local") for path, leaf in placed.items()}
    for end in (".mu['2.weight'].a", ".nu['2.weight'].b", "['trainable']['2.weight'].b", "['2.weight'].base.base"):
        assert [is_shard[path] for path in placed if path.endswith(end)] == [True], end
    for end in (".count['2.weight'].b", "['trainable']['2.bias']", "['2.weight'].seed"):
        assert [is_shard[path] for path in placed if path.endswith(end)] == [False], end
    for path, leaf in placed.items():
        local = leaf.to_local() if is_shard[path] else leaf
        assert local.data_ptr() == tensors[path].data_ptr(), f"{path} must be in the memory of the state"


def test_paths_and_memory_are_those_of_the_state():
    in_processes(2, _paths)


def _refusals() -> None:
    trainable = state_of(1)["trainable"]
    for leaf in (3, 0.5, True, "adamw", b"x", torch.float32, len):
        with pytest.raises(TypeError, match=re.escape(f"`tree` has {leaf!r} at ['x'][0], which is not a tensor")):
            dl.parallel.as_dtensors({"x": [leaf]})
    norms = tree_map(torch.linalg.vector_norm, trainable)
    assert isinstance(norms["2.weight"], ShardedFactors)
    with pytest.raises(
        ValueError, match=r"a tensor of shape \(\) in the ShardedFactors at \['[^']*weight'\] is not a shard"
    ):
        dl.parallel.as_dtensors(norms)
    other = trainable["2.weight"]._replace(b=torch.zeros(11, 3))
    with pytest.raises(
        ValueError, match=r"shape \(11, 3\) in the ShardedFactors at \['w'\] is not a shard: .* [56] entries"
    ):
        dl.parallel.as_dtensors({"w": other})
    assert dl.parallel.as_dtensors({"none": None, "nothing": ()}) == {}


def test_what_a_checkpoint_would_lose_is_refused_by_its_path():
    in_processes(2, _refusals)


def test_rows_that_do_not_follow_each_other_are_refused(monkeypatch):
    """As those of a mode that deals rows out in turn would be."""
    monkeypatch.setattr(Sharding, "local_rows", property(lambda self: slice(self.process, self.rows, self.world_size)))
    state = {"w": Sharded(torch.zeros(2, 3), Sharding("0", world_size=2, process=0, rows=4))}
    with pytest.raises(ValueError, match=r"the rows of this process at \['w'\] do not follow each other"):
        dl.parallel.as_dtensors(state)
