"""Transforms of weights do on shards what they do on whole weights, or refuse them by name."""

import pytest
import torch

import dynlora_fn as dl
from tests.support.processes import in_processes
from tests.support.sharding import fresh


def _assert_same_weights(sharded: dict, params: dict) -> None:
    weights = [dl.materialize(tree) for tree in (dl.parallel.unshard(sharded), params)]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)


def _compare(base, residual) -> None:
    group = torch.distributed.group.WORLD
    params = fresh(base, residual)
    rows = dl.parallel.shard(params, group)
    plan = dl.schedules.every(1)(1, params)
    other, other_rows = (dl.switch(tree, plan).params for tree in (params, rows))
    _assert_same_weights(dl.decay(rows, 0.25), dl.decay(params, 0.25))
    averages = (dl.optim.average(*pair, decay=0.5) for pair in ((rows, other_rows), (params, other)))
    _assert_same_weights(*averages)
    _assert_same_weights(*(dl.resize(tree, rank=1).params for tree in (rows, params)))
    name = next(name for name, param in params.items() if isinstance(param, dl.LowRank))
    *stack, out_features, in_features = params[name].shape
    b, a = torch.ones(*stack, out_features, 1), torch.ones(*stack, 1, in_features)
    _assert_same_weights(*({name: dl.switching.fold(tree[name], b, a)} for tree in (rows, params)))

    shards = dl.parallel.shard_factors(rows)
    _assert_same_weights(dl.decay(shards, 0.25), dl.decay(params, 0.25))
    _assert_same_weights({name: dl.switching.fold(shards[name], b, a)}, {name: dl.switching.fold(params[name], b, a)})
    with pytest.raises(ValueError, match=r"`averaged` has sharded factors for .*; call `unshard` first"):
        dl.optim.average(shards, shards, decay=0.5)
    with pytest.raises(ValueError, match=r"`params` has sharded factors for .*; call `unshard` first"):
        dl.resize(shards, rank=1)


def _compare_without_rows() -> None:
    group = torch.distributed.group.WORLD
    for base in ("int8", "float8", "bfloat16", "mxfp4", "nvfp4"):
        params = dl.init({"w": torch.linspace(-1, 1, 64)[None]}, rank=1, seed=0, targets=["w"])
        params = dl.bases.quantize(params, base)
        rows = dl.parallel.shard(params, group)
        for change in (
            lambda tree: dl.decay(tree, 0.25),
            dl.merge,
            lambda tree: dl.optim.average(tree, dl.decay(tree, 0.5), decay=0.5),
            lambda tree: {"w": dl.switching.fold(tree["w"], torch.ones(1, 1), torch.ones(1, 64))},
        ):
            _assert_same_weights(change(rows), change(params))


def test_weights_change_where_a_process_has_no_rows():
    in_processes(2, _compare_without_rows)


def _compare_all() -> None:
    for base, residual in [(None, None), ("int8", "bfloat16"), ("float8", "int8")]:
        _compare(base, residual)


@pytest.mark.slow
def test_weights_on_shards_change_as_whole_ones():
    in_processes(2, _compare_all)
