"""A step on sharded bases gives the bits of a step on unsharded bases."""

import pytest
import torch
from torch import nn

import dynlora_fn as dl
from tests.support.processes import in_processes
from tests.support.sharding import NET, Gathered, bits, bytes_of, fresh

BASES = [(None, None), ("bfloat16", "int8"), ("int8", "bfloat16"), ("int8", None), ("float8", "int8")]


def _compare(base, residual) -> None:
    group = torch.distributed.group.WORLD
    params = fresh(base, residual)
    before = bits(params)
    sharded = dl.parallel.shard(params, group)
    assert bits(params) == before
    assert bits(dl.parallel.unshard(sharded)) == before
    assert bits(dl.materialize(sharded)) == bits(dl.materialize(params))
    assert bits(dl.state_dict(NET, sharded)) == bits(dl.state_dict(NET, params))

    plan = dl.schedules.every(1)(1, params)
    merged = {kind: dl.merge(tree) for kind, tree in (("whole", params), ("sharded", sharded))}
    switched = {kind: dl.switch(tree, plan).params for kind, tree in merged.items()}
    waiting = {kind: dl.switch(dl.bases.defer(tree, vectors=8), plan).params for kind, tree in merged.items()}
    folded = {kind: dl.bases.fold_pending(tree) for kind, tree in waiting.items()}
    assert bits(merged["whole"]) != bits(switched["whole"]) != bits(folded["whole"])
    for pair in (merged, switched, folded):
        assert bits(dl.partition(pair["sharded"]).trainable) == bits(dl.partition(pair["whole"]).trainable)
        if base is None:
            assert bits(dl.parallel.unshard(pair["sharded"])) == bits(pair["whole"])
        # The product that is folded into codes is one of a matrix with fewer rows: a processor may round its last bit
        # in another way.
        weights = [dl.materialize(dl.parallel.unshard(tree)) for tree in (pair["sharded"], pair["whole"])]
        torch.testing.assert_close(*weights, rtol=0, atol=1e-6)
        drifts = [dl.bases.drift(tree) for tree in (pair["sharded"], pair["whole"])]
        torch.testing.assert_close(*drifts, rtol=1e-4, atol=0, equal_nan=True)

    for tokens in (1, 4096):  # the path is the cheapest one for so many
        x = torch.randn(tokens, 18)
        grads = [dl.value_and_grad(_loss)(tree[0], tree[1], x) for tree in map(dl.partition, (params, sharded))]
        if tokens > 1:  # with unsharded bases, so few tokens take the factored path
            assert bits(grads[0]) == bits(grads[1])
        torch.testing.assert_close(grads[1], grads[0])
    via = dl.value_and_grad(_loss, via="autograd")(*dl.partition(sharded), x)
    torch.testing.assert_close(via, grads[0])
    per_sample = torch.func.vmap(torch.func.grad(_loss), in_dims=(None, None, 0))
    rows = [per_sample(*dl.partition(tree), x[:3, None]) for tree in (params, sharded)]
    torch.testing.assert_close(rows[1], rows[0])


def _loss(trainable, frozen, x):
    return dl.call(NET, dl.combine(trainable, frozen), x).square().mean()


def _compare_all(bases) -> None:
    for base, residual in bases:
        _compare(base, residual)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 4])
def test_a_sharded_base_gives_the_bits_of_the_whole_one(size: int):
    in_processes(size, _compare_all, BASES if size > 1 else BASES[:1])


TIED = [("nf4", "bfloat16"), ("nf4", None), ("nvfp4", "int8"), ("nvfp4", None), ("mxfp4", "bfloat16")]


def tied_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 64)) for _ in range(2)))


def _compare_tied(base, residual) -> None:
    group, model = torch.distributed.group.WORLD, tied_net()
    params = dl.init(model, rank=2, seed=0, targets=["*.weight"], base=base, residual=residual)
    sharded = dl.parallel.shard(params, group)
    assert bits(dl.parallel.unshard(sharded)) == bits(params)
    assert bits(dl.materialize(sharded)) == bits(dl.materialize(params))
    folded, unsharded = (dl.switch(tree, dl.schedules.every(1)(1, tree)).params for tree in (sharded, params))
    for name in (name for name, param in params.items() if isinstance(param, dl.LowRank)):
        folded_base = dl.parallel.unshard(folded)[name].base
        weights = [dl.materialize(tree[name]) for tree in (dl.parallel.unshard(folded), unsharded)]
        if base == "nvfp4":  # each row has its factor and so other codes: the error is as small
            assert folded_base.codes.factor.shape == (*weights[0].shape[:-1], 1)
            missed = [(weight - dl.materialize(params[name])).norm() for weight in weights]
            assert missed[0] < 1.1 * missed[1]
        else:  # except for the last bit of a product, which may move a code
            assert (weights[0] != weights[1]).float().mean() < 1e-3
            assert torch.equal(dl.materialize(folded[name]), weights[0])
    assert bits(dl.parallel.shard(dl.parallel.unshard(folded), group)) == bits(folded)  # a round trip
    assert dl.parallel.wire_bytes(*dl.partition(sharded)).bases == _gathered_bytes(params, base, 2)
    x, packed = torch.randn(4096, 64), dl.partition(sharded)

    def loss(trainable, frozen):
        return dl.call(model, dl.combine(trainable, frozen), x).square().mean()

    with Gathered() as gathered:
        grads = dl.value_and_grad(loss)(*packed)
    assert gathered.total == dl.parallel.wire_bytes(*packed).bases
    assert bits(grads) == bits(dl.value_and_grad(loss)(*dl.partition(params)))


def _gathered_bytes(params, base, gathers) -> int:
    """Return the bytes of all codes. nf4's means are on every process, and nvfp4 has a factor for each row."""
    low_rank = [param for param in params.values() if isinstance(param, dl.LowRank)]
    total = sum(bytes_of(param.base.codes) for param in low_rank)
    if base == "nf4":
        total -= sum(bytes_of(param.base.codes.mean) for param in low_rank)
    elif base == "nvfp4":
        total += sum(4 * (param.base.codes.codes[..., 0].numel() - param.seed.numel()) for param in low_rank)
    return gathers * total


def _compare_all_tied() -> None:
    for base, residual in TIED:
        _compare_tied(base, residual)
    placed = dl.parallel.as_dtensors(
        dl.parallel.shard(
            dl.init(tied_net(), rank=2, seed=0, targets=["*.weight"], base="nf4"), torch.distributed.group.WORLD
        )
    )
    expected_codes = dl.init(tied_net(), rank=2, seed=0, targets=["*.weight"], base="nf4")["*.*.weight"].base.codes
    for name in ("codes", "scales", "factor"):
        placed_leaf = placed[f"['*.*.weight'].base.base.codes.{name}"]
        assert placed_leaf.shape == getattr(expected_codes, name).shape
        assert torch.equal(placed_leaf.full_tensor(), getattr(expected_codes, name))
    one_factor = dl.init(nn.Linear(64, 64), rank=2, seed=0, targets=["weight"], base="nf4")
    with pytest.raises(
        ValueError, match=r"base of 'weight' .*, in nf4 and of shape \(64, 64\), .* a multiple of the 4096 entries"
    ):
        dl.parallel.shard(one_factor, torch.distributed.group.WORLD)


@pytest.mark.slow
def test_tied_rows_give_the_bits_of_the_whole():
    in_processes(2, _compare_all_tied)


def _refusals() -> None:
    group = torch.distributed.group.WORLD
    linear = nn.Linear(64, 64)
    sharded = dl.parallel.shard(dl.init(linear, rank=2, seed=0, targets=["weight"]), group)
    with pytest.raises(ValueError, match="the base of 'weight' in `params` is sharded already"):
        dl.parallel.shard(sharded, group)
    with pytest.raises(ValueError, match="the base of 'weight' in `params` is sharded; call `quantize` before `shard`"):
        dl.bases.quantize(sharded, "int8")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "model"))
    with pytest.raises(ValueError, match="`group` is a mesh of 2 dimensions; pass a mesh of one dimension"):
        dl.parallel.shard(dl.parallel.unshard(sharded), mesh)
    assert dl.parallel.shard(dl.parallel.unshard(sharded), mesh["data"])["weight"].base.sharding.rows == 64


def test_what_cannot_be_sharded_is_refused_by_name():
    in_processes(1, _refusals)
