"""`torch.load(weights_only=True)` reads parameters and states, whose types are registered on import."""

import inspect
import io
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

import dynlora_fn as dl
from dynlora_fn.interop._torch_load import record_types
from dynlora_fn.testing import assert_same, normal
from tests.support.optimizer_table import OPTIMIZERS

DENSE = {"layers.0.w": normal(0, 32, 32), "layers.1.w": normal(1, 32, 32), "norm": normal(2, 32)}


def reloaded(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("base", [None, "int8", "float8", "nf4", "bfloat16"])
def test_parameters_are_read(base: str | None):
    params = dl.init(DENSE, rank=2, seed=0, targets=["*.w"], base=base)
    plan = dl.schedules.every(1, count=1)(0, params)
    for state in (params, dl.partition(params), plan, dl.switching.init_pool(params)):
        assert_same(reloaded(state), state)


def test_factors_with_an_alpha_are_read():
    params = dl.init(DENSE, rank=2, seed=0, targets=["*.w"], alpha=3)
    assert_same(reloaded(params), params)
    assert reloaded(params)["layers.*.w"].factors.alpha == params["layers.*.w"].factors.alpha


@pytest.mark.parametrize("name", [*OPTIMIZERS, "8bit"])
def test_states_of_optimizers_are_read(name: str):
    transform = dl.optim.adamw(moments="8bit") if name == "8bit" else OPTIMIZERS[name].transform
    trainable = dl.partition(dl.init(DENSE, rank=2, seed=0, targets=["*.w"])).trainable
    state = transform.init(trainable)
    assert_same(reloaded(state), state)


def test_constants_are_read():
    params = dl.bases.defer(dl.init(DENSE, rank=2, seed=0, targets=["*.w"]), vectors=2)
    assert_same(reloaded(params), params)
    sharding = dl.parallel.Sharding("group", 2, 1, 8)
    factors = dl.parallel.ShardedFactors(torch.ones(4, 2), torch.ones(2, 3), sharding)
    assert reloaded(factors).sharding == sharding
    assert_same(tree_map(torch.clone, reloaded(factors)), factors)


def test_every_public_record_is_registered():
    spaces = [dl, dl.bases, dl.optim, dl.parallel, dl.schedules, dl.switching]
    public = [value for space in spaces for value in vars(space).values() if inspect.isclass(value)]
    records = {kind for kind in public if hasattr(kind, "_fields")}
    assert len(records) > 20
    assert records <= {*record_types()}
    assert records | {dl.interop.FrozenTensor} <= {*torch.serialization.get_safe_globals()}
