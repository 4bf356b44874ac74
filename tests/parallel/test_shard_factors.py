"""Sharded factors and their optimizer state are those of unsharded factors, in shards."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.utils._pytree import tree_leaves, tree_map

import dynlora_fn as dl
from dynlora_fn.parallel import ShardedFactors
from dynlora_fn.testing import assert_same, normal
from tests.support.processes import in_processes

SCHEDULE = dl.schedules.switchlora(40, interval=10, ratio=1.0)


def net() -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(18, 18), nn.GELU()) for _ in range(2)]
    return nn.Sequential(nn.Embedding(11, 18), *blocks, nn.Linear(18, 11))


NET = net()
TARGETS = ["*.weight"]


def fresh(base=None) -> dict:
    return dl.init(NET, rank=4, seed=0, targets=TARGETS, base=base)


def _bits() -> None:
    group = torch.distributed.group.WORLD
    params = fresh()
    sharded = dl.parallel.shard_factors(dl.parallel.shard(params, group))
    assert {name: leaf.shape for name, leaf in sharded.items()} == {name: leaf.shape for name, leaf in params.items()}

    def assert_equal(left, right):
        torch.testing.assert_close(left, right, rtol=0, atol=0)

    assert_equal(dl.parallel.unshard(sharded), params)
    assert_equal(dl.materialize(sharded), dl.materialize(params))
    assert_equal(dl.parallel.unshard(dl.merge(sharded)), dl.merge(params))
    plan = dl.schedules.every(1)(1, params)
    switched, outgoing = dl.switch(sharded, plan)
    expected, wanted = dl.switch(params, plan)
    assert_equal(dl.parallel.unshard(switched), expected)
    (name, *_) = outgoing
    sharding = outgoing[name].sharding
    assert_equal(outgoing[name].b, wanted[name].b[..., sharding.local_rows, :])
    assert_equal(outgoing[name].a, wanted[name].a[..., sharding.as_columns.local_rows])
    assert_same(dl.switch(switched, plan, incoming=outgoing).params[name].factors, sharded[name].factors)
    other = {key: leaf._replace(sharding=replace(leaf.sharding, process=7)) for key, leaf in outgoing.items()}
    with pytest.raises(ValueError, match=r"`incoming` for '.*' is sharded as .*process=7.*, but the factors as"):
        dl.switch(switched, plan, incoming=other)
    x = torch.randint(11, (4, 5))
    via = [dl.value_and_grad(_loss, via=via)(*dl.partition(sharded), x).grads for via in ("func", "autograd")]
    assert_same(*via)
    remat = dl.value_and_grad(_loss)(*dl.partition(sharded), x, dl.remat(NET, ["1", "2"])).grads
    torch.testing.assert_close(tree_leaves(remat), tree_leaves(via[0]))


def _loss(trainable, frozen, x, model=NET):
    return dl.call(model, dl.combine(trainable, frozen), x).square().mean()


def test_bits_are_those_of_whole_factors():
    in_processes(2, _bits)


def _carried() -> None:
    group = torch.distributed.group.WORLD
    params = fresh()
    trainable, frozen = dl.partition(dl.parallel.shard_factors(dl.parallel.shard(params, group)))
    whole, whole_frozen = dl.partition(params)
    x = torch.randint(11, (4, 5))
    grads = dl.value_and_grad(_loss)(trainable, frozen, x).grads
    whole_grads = dl.value_and_grad(_loss)(whole, whole_frozen, x).grads
    scaled = tree_map(lambda leaf: 0.5 * leaf, grads)
    opt_state = dl.optim.adamw(moments="8bit").init(trainable)
    moments = [tree for tree in tree_leaves(opt_state, is_leaf=_is_sharded) if _is_sharded(tree)]
    assert len(moments) == 2 * sum(map(_is_sharded, trainable.values()))
    assert all(leaf.sharding == trainable[name].sharding for name, leaf in scaled.items() if _is_sharded(leaf))
    # Nobody passes the sharding, and yet the norm is the one of the whole gradients.
    norms = [dl.optim.clip_by_global_norm(tree, 1.0).norm for tree in (grads, whole_grads)]
    torch.testing.assert_close(*norms)
    nested = dl.optim.clip_by_global_norm({"model": grads, "other": grads}, 1.0).norm
    torch.testing.assert_close(nested, 2**0.5 * norms[0])
    reduced = dl.parallel.all_reduce_mean({"inner": [grads]}, group)["inner"][0]
    assert_same({name: leaf for name, leaf in reduced.items() if _is_sharded(leaf)}, _sharded_only(grads))
    with pytest.raises(ValueError, match="too many values to unpack"):
        _, _ = next(iter(_sharded_only(trainable).values()))


def _is_sharded(node) -> bool:
    return isinstance(node, ShardedFactors)


def _sharded_only(tree: dict) -> dict:
    return {name: leaf for name, leaf in tree.items() if _is_sharded(leaf)}


def test_gradients_and_moments_carry_the_sharding_of_their_factors():
    in_processes(2, _carried)


WEIGHT = dl.init({"w": normal(0, 256, 60, dtype=torch.float32)}, rank=60, seed=0, targets=["w"])


def eight_bit(weight: dict, seeds: range, state=None, group=None) -> tuple:
    """Return the frozen part, and the trainable part and state after some updates."""
    optimizer = dl.optim.adamw(moments="8bit")
    group = group or torch.distributed.group.WORLD
    trainable, frozen = dl.partition(dl.parallel.shard_factors(dl.parallel.shard(weight, group)))
    trainable, moments = (trainable, optimizer.init(trainable)) if state is None else state
    for seed in seeds:
        grads = tree_map(lambda leaf: normal(seed, *leaf.shape, dtype=torch.float32), trainable)  # noqa: B023, at once
        updates, moments = optimizer.update(grads, moments, trainable, lr=0.01)
        trainable = dl.apply_updates(trainable, updates)
    return frozen, (trainable, moments)


def _eight_bit(folder: Path) -> None:
    frozen, state = eight_bit(WEIGHT, range(2))
    assert isinstance(state[1].inner.mu["w"].b, dl.optim.SignedMoment)
    assert isinstance(state[1].inner.nu["w"].a, torch.Tensor)  # too small to shard
    checkpoint.save(dl.parallel.as_dtensors((frozen, state)), checkpoint_id=folder)
    frozen, loaded = eight_bit(WEIGHT, range(0))
    checkpoint.load(dl.parallel.as_dtensors((frozen, loaded)), checkpoint_id=folder)
    assert_same(loaded, state)
    assert_same(eight_bit(WEIGHT, range(2, 4), loaded), eight_bit(WEIGHT, range(4)))
    uneven = eight_bit(dl.init({"w": torch.ones(257, 256)}, rank=256, seed=0, targets=["w"]), range(1))
    dl.parallel.check_replicas(uneven, torch.distributed.group.WORLD)  # 129 and 128 rows: full precision on both
    mu = uneven[1][1].inner.mu["w"]
    assert isinstance(mu.b, torch.Tensor)
    assert isinstance(mu.a, dl.optim.SignedMoment)
    assert {leaf.shape[:1] for path, leaf in dl.parallel.as_dtensors(uneven).items() if path.endswith("mu['w'].b")} == {
        (257,)
    }
    alone = [torch.distributed.new_group([process]) for process in range(2)][torch.distributed.get_rank()]
    with pytest.raises(
        checkpoint.CheckpointException, match=r"Size mismatch .*\[2, 30\].*\[1, 60\].*mu\['w'\].b.scale"
    ):
        checkpoint.load(
            dl.parallel.as_dtensors(eight_bit(WEIGHT, range(0), group=alone)), checkpoint_id=folder, no_dist=True
        )


def test_moments_in_8_bit_go_on_with_as_many_processes(tmp_path: Path):
    in_processes(2, _eight_bit, tmp_path)


def _muon() -> None:
    """Compare on three processes, which do not divide the rows evenly."""
    params = dl.init(NET, rank=4, seed=0, targets=TARGETS, dtype=torch.float64)
    params = {name: param for name, param in params.items() if isinstance(param, dl.LowRank)}
    unsharded = dl.partition(params).trainable
    sharded = dl.partition(
        dl.parallel.shard_factors(dl.parallel.shard(params, torch.distributed.group.WORLD))
    ).trainable

    def part(factors, sharding):
        b, a = factors.b[..., sharding.local_rows, :], factors.a[..., sharding.as_columns.local_rows]
        return ShardedFactors(b, a, sharding)

    def moved(optimizer, trainable, lr, of=lambda name, grad: grad):
        state = optimizer.init(trainable)
        for step in range(2):
            grads = {
                name: of(name, dl.Factors(normal(step, *leaf.b.shape), normal(step + 9, *leaf.a.shape)))
                for name, leaf in unsharded.items()
            }
            updates, state = optimizer.update(grads, state, trainable, lr=lr)
            trainable = dl.apply_updates(trainable, updates)
        return trainable

    def of(name, grad):
        return part(grad, sharded[name].sharding)

    separate, coupled = dl.optim.muon(), dl.optim.muon(coefficients="polar_express_8", coupled=3)
    for optimizer, lr in itertools.product((separate, coupled), (1e-6, 1.0)):  # no step is too long, and all are
        expected = moved(optimizer, unsharded, lr)
        wanted = {name: of(name, leaf) for name, leaf in expected.items()}
        got = moved(optimizer, sharded, lr, of)
        assert all((wanted[name].b - sharded[name].b).abs().max() > 1e-3 * lr for name in wanted)
        torch.testing.assert_close(tree_leaves(got), tree_leaves(wanted), rtol=0, atol=1e-9 * lr)


def test_muon_moves_shares_as_it_moves_whole_factors():
    in_processes(3, _muon)


def _refusals() -> None:
    group = torch.distributed.group.WORLD
    params = fresh()
    with pytest.raises(
        ValueError, match=r"the factors of '0.weight' in `params` cannot be sharded: its base must be sharded"
    ):
        dl.parallel.shard_factors(params)
    sharded = dl.parallel.shard_factors(dl.parallel.shard(params, group))
    with pytest.raises(ValueError, match=r"cannot be sharded: .* its factors must not be sharded already"):
        dl.parallel.shard_factors(sharded)
    for change in (
        lambda: dl.bases.defer(sharded, vectors=8),
        lambda: dl.switching.init_pool(sharded),
        lambda: dl.optim.compensate(sharded, dl.materialize(params), lr=0.1),
        lambda: dl.optim.project_gradients(dl.materialize(params), sharded),
    ):
        with pytest.raises(ValueError, match="must have whole factors"):
            change()
    linear = {
        "w": dl.parallel.shard_factors(
            dl.parallel.shard(dl.init({"w": torch.ones(6, 4)}, rank=2, seed=0, targets=["w"]), group)
        )["w"]
    }
    with pytest.raises(NotImplementedError, match=r"has sharded factors, which `torch.vmap` does not support"):
        torch.vmap(lambda x: dl.linear(x, linear["w"], path="merged"))(torch.ones(3, 4))


def test_what_sharded_factors_cannot_do_is_refused():
    in_processes(1, _refusals)
