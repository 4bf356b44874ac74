"""Bases of which each process holds some rows: the bits of the whole, a quarter of the memory, one weight at a time."""

import time
import weakref

import pytest
import torch
from ranks import in_ranks
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import dynlora_fn as dl

BASES = [(None, None), ("bfloat16", "int8"), ("int8", "bfloat16"), ("int8", None), ("float8", "int8")]


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
    """The bytes that are gathered, and the most of them that are in memory at once.

    A thread of gloo lets go of a result some time after it is there. What is beyond `room` is therefore looked at once
    more, up to a second later: what the program itself holds is still there then.
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
        while self._held() + size > self.room and time.monotonic() < until:
            time.sleep(0.001)
        self.most = max(self.most, self._held() + size)
        self._alive[storage.data_ptr()] = weakref.ref(storage), size

    def _held(self) -> int:
        self._alive = {at: pair for at, pair in self._alive.items() if pair[0]() is not None}
        return sum(size for _, size in self._alive.values())


# --- the bits of the whole


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
    merged = {kind: dl.merge(one) for kind, one in (("whole", params), ("sharded", sharded))}
    switched = {kind: dl.switch(one, plan).params for kind, one in merged.items()}
    waiting = {kind: dl.switch(dl.bases.defer(one, vectors=8), plan).params for kind, one in merged.items()}
    folded = {kind: dl.bases.fold_pending(one) for kind, one in waiting.items()}
    assert bits(merged["whole"]) != bits(switched["whole"]) != bits(folded["whole"])
    for pair in (merged, switched, folded):
        assert bits(dl.partition(pair["sharded"]).trainable) == bits(dl.partition(pair["whole"]).trainable)
        if base is None:
            assert bits(dl.parallel.unshard(pair["sharded"])) == bits(pair["whole"])
        # The product that is folded into codes is one of a matrix with fewer rows: a processor may round its last bit
        # in another way.
        weights = [dl.materialize(dl.parallel.unshard(one)) for one in (pair["sharded"], pair["whole"])]
        torch.testing.assert_close(*weights, rtol=0, atol=1e-6)
        drifts = [dl.bases.drift(one) for one in (pair["sharded"], pair["whole"])]
        torch.testing.assert_close(*drifts, rtol=1e-4, atol=0, equal_nan=True)

    for tokens in (1, 4096):  # the path is the cheapest one for so many
        x = torch.randn(tokens, 18)
        grads = [dl.value_and_grad(_loss)(one[0], one[1], x) for one in map(dl.partition, (params, sharded))]
        if tokens > 1:  # of whole ones, so few tokens go by the factored path
            assert bits(grads[0]) == bits(grads[1])
        torch.testing.assert_close(grads[1], grads[0])
    via = dl.value_and_grad(_loss, via="autograd")(*dl.partition(sharded), x)
    torch.testing.assert_close(via, grads[0])
    per_sample = torch.func.vmap(torch.func.grad(_loss), in_dims=(None, None, 0))
    rows = [per_sample(*dl.partition(one), x[:3, None]) for one in (params, sharded)]
    torch.testing.assert_close(rows[1], rows[0])


def _loss(trainable, frozen, x):
    return dl.call(NET, dl.combine(trainable, frozen), x).square().mean()


def _compare_all(bases) -> None:
    for base, residual in bases:
        _compare(base, residual)


@pytest.mark.parametrize("size", [1, 4])
def test_a_sharded_base_gives_the_bits_of_the_whole_one(size: int):
    in_ranks(size, _compare_all, BASES if size > 1 else BASES[:1])


# --- codes whose rows are tied together

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
    folded, whole = (dl.switch(one, dl.schedules.every(1)(1, one)).params for one in (sharded, params))
    for name in (name for name, param in params.items() if isinstance(param, dl.LowRank)):
        held = dl.parallel.unshard(folded)[name].base
        weights = [dl.materialize(one[name]) for one in (dl.parallel.unshard(folded), whole)]
        if base == "nvfp4":  # each row has a factor of its own, and with it other codes: quantized as well
            assert held.codes.factor.shape == (*weights[0].shape[:-1], 1)
            missed = [(weight - dl.materialize(params[name])).norm() for weight in weights]
            assert missed[0] < 1.1 * missed[1]
        else:  # but for the last bit of a product, which may move a code
            assert (weights[0] != weights[1]).float().mean() < 1e-3
            assert torch.equal(dl.materialize(folded[name]), weights[0])
    assert bits(dl.parallel.shard(dl.parallel.unshard(folded), group)) == bits(folded)  # once more
    assert dl.parallel.wire_bytes(*dl.partition(sharded)).bases == _seen_bytes(params, base, 2)
    x, packed = torch.randn(4096, 64), dl.partition(sharded)

    def loss(trainable, frozen):
        return dl.call(model, dl.combine(trainable, frozen), x).square().mean()

    with Gathered() as seen:
        grads = dl.value_and_grad(loss)(*packed)
    assert seen.total == dl.parallel.wire_bytes(*packed).bases
    assert bits(grads) == bits(dl.value_and_grad(loss)(*dl.partition(params)))


def _seen_bytes(params, base, gathers) -> int:
    """Of all codes; nf4's means are everywhere, and nvfp4 has a factor for each row."""
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
    whole = dl.init(tied_net(), rank=2, seed=0, targets=["*.weight"], base="nf4")["*.*.weight"].base.codes
    for name in ("codes", "scales", "factor"):
        made = getattr(placed["*.*.weight"].base.base.codes, name)
        assert made.shape == getattr(whole, name).shape
        assert torch.equal(made.full_tensor(), getattr(whole, name))
    one_factor = dl.init(nn.Linear(64, 64), rank=2, seed=0, targets=["weight"], base="nf4")
    with pytest.raises(
        ValueError, match=r"base of 'weight' .*, in nf4 and of shape \(64, 64\), .* a multiple of the 4096 entries"
    ):
        dl.parallel.shard(one_factor, torch.distributed.group.WORLD)


def test_tied_rows_give_the_bits_of_the_whole():
    in_ranks(2, _compare_all_tied)


# --- memory and messages


def _memory_and_messages(base, residual) -> dict:
    group = torch.distributed.group.WORLD
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(6)))
    params = dl.init(model, rank=4, seed=0, targets=["*.0.weight"], base=base, residual=residual)
    sharded = dl.parallel.shard(params, group)
    trainable, frozen = dl.partition(sharded)

    def loss(trainable):
        return dl.call(model, dl.combine(trainable, frozen), torch.ones(256, 64)).square().mean()

    (name,) = (name for name in params if name.endswith("weight"))
    held, whole = sharded[name].base.base, params[name].base
    one = bytes_of(whole if isinstance(whole, torch.Tensor) else whole.codes) / 6
    with Gathered(room=one) as step:
        dl.value_and_grad(loss)(trainable)
    with Gathered() as switch:
        switched, _ = dl.switch(sharded, dl.schedules.every(1)(1, sharded))
        dl.merge(switched)
    return {
        "share": sum(leaf.untyped_storage().nbytes() for leaf in tree_leaves(held)) / bytes_of(whole),
        "step": step,
        "one": one,
        "predicted": dl.parallel.wire_bytes(trainable, frozen).bases,
        "switch": switch.total,
    }


@pytest.mark.parametrize(("base", "residual"), [(None, None), ("int8", "bfloat16")])
def test_a_quarter_is_held_one_weight_is_gathered_at_a_time_and_a_switch_sends_nothing(base, residual):
    for found in in_ranks(4, _numbers, base, residual):
        assert found["share"] == 0.25
        assert found["most"] <= found["one"]
        # Forward and backward, in the very codes that are stored; nothing else and nothing scattered.
        assert found["total"] == found["predicted"] == 2 * 6 * found["one"]
        assert found["scattered"] == found["switch"] == 0


def _numbers(base, residual) -> dict:
    found = _memory_and_messages(base, residual)
    step = found.pop("step")
    return {**found, "most": step.most, "total": step.total, "scattered": step.scattered}


def _compiled_numbers(base, residual) -> dict:
    group = torch.distributed.group.WORLD
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(18, 18), nn.GELU()) for _ in range(3)))
    params = dl.init(model, rank=2, seed=0, targets=["*.0.weight"], base=base, residual=residual)
    (name,) = (name for name in params if name.endswith("weight"))
    whole = params[name].base

    def step(state, x):
        trainable, frozen = state

        def loss(trainable):
            return dl.call(model, dl.combine(trainable, frozen), x).square().mean()

        loss, grads = dl.parallel.all_reduce_mean(tuple(dl.value_and_grad(loss)(trainable)), group)
        return (dl.apply_updates(trainable, tree_map(lambda leaf: -leaf, grads)), frozen), loss

    state, x = dl.partition(dl.parallel.shard(params, group)), torch.ones(64, 18)
    expected = [step(state, x)[1]]
    expected.append(step(step(state, x)[0], x)[1])
    # What is gathered is told apart from what is written over it.
    compiled = dl.compile_step(step, options={"allow_buffer_reuse": False})
    state = tuple(state)
    losses = [compiled(state, x).aux]
    packet, one = torch.ops._c10d_functional.all_gather_into_tensor, bytes_of(_seen(whole)) / 3
    gather, seen = packet.default, Gathered(room=one * 20 / 18)

    def watched(*args):
        result = gather(*args)
        seen.note(result)
        return result

    packet.default = watched  # which the code that was generated looks up as it runs
    losses.append(compiled(state, x).aux)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    return {"one": one, "most": seen.most, "total": seen.total}


def _seen(base):
    return base if isinstance(base, torch.Tensor) else base.codes


@pytest.mark.inductor
def test_compiled_one_weight_is_gathered_at_a_time():
    """On four processes with rows that must be padded."""
    for found in in_ranks(4, _compiled_numbers, "int8", "bfloat16"):
        padded = found["one"] * 20 / 18
        assert found["total"] == pytest.approx(2 * 3 * padded)
        assert 0 < found["most"] <= padded


class Read(dict):
    """Weights that are read one by one, and the most bytes of a tensor that is left of those read before."""

    def __init__(self, weights, made: "Made"):
        super().__init__({name: weight.detach() for name, weight in weights.items()})
        self.made, self.left = made, []

    def __getitem__(self, name):
        self.left.append(self.made.largest())
        return super().__getitem__(name).clone()


class Made(TorchDispatchMode):
    """What operations have made and is still there."""

    def __init__(self):
        super().__init__()
        self._made: list[weakref.ref] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        real = [leaf for leaf in tree_leaves(result) if torch.is_tensor(leaf) and not leaf.is_meta]
        self._made += [weakref.ref(leaf.untyped_storage()) for leaf in real]
        return result

    def largest(self) -> int:
        return max((storage.nbytes() for made in self._made if (storage := made()) is not None), default=0)


def _made_in_shards(base, residual) -> None:
    group = torch.distributed.group.WORLD
    options = {"rank": 2, "seed": 0, "targets": ["*.weight"], "base": base, "residual": residual}
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(3)), nn.Linear(64, 3))
    with torch.device("meta"):
        empty = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(3)), nn.Linear(64, 3))
    made = Made()
    weights = Read(dict(model.named_parameters()), made)
    with made:
        params = dl.init(empty, weights=weights, **options, group=group)
    assert len(weights.left) == len(weights)
    whole = 64 * 64 * 4
    assert 0 < max(weights.left[1:3]) <= whole / 4  # the rows of one weight, of three that make a stack
    assert max(weights.left) <= 3 * whole / 4  # of all three
    expected = dl.parallel.shard(dl.init(model, **options), group)
    assert expected.keys() == params.keys()
    assert bits(params) == bits(expected)
    assert bits(dl.parallel.unshard(params)) == bits(dl.init(model, **options))


@pytest.mark.parametrize(("base", "residual"), [(None, None), ("int8", "bfloat16")])
def test_parameters_are_made_in_shards_one_weight_at_a_time(base, residual):
    in_ranks(4, _made_in_shards, base, residual)


# --- what is refused


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
    in_ranks(1, _refusals)


# --- by their place in the whole


def _dtensors() -> None:
    group = torch.distributed.group.WORLD
    params = fresh("int8", "bfloat16")
    sharded = dl.parallel.shard(params, group)
    placed = dl.parallel.as_dtensors({"params": sharded})["params"]
    for name in ("3.weight", "*.*.weight"):
        held, whole = placed[name].base.base, params[name].base
        for one, other in zip((held.codes.codes, held.residual), (whole.codes.codes, whole.residual), strict=True):
            assert one.shape == other.shape
            assert torch.equal(one.full_tensor(), other)
    placed["3.weight"].base.base.codes.codes.to_local().zero_()
    assert not sharded["3.weight"].base.base.codes.codes.any()  # the same memory


def test_dtensors_have_the_whole_ones_shape_and_the_shards_memory():
    in_ranks(2, _dtensors)
