"""Sharded bases take a fraction of the memory, and one weight is gathered at a time."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import dynlora_fn as dl
from tests.support.processes import in_processes
from tests.support.sharding import Gathered, bytes_of, fresh


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
    sharded_base, unsharded_base = sharded[name].base.base, params[name].base
    weight_bytes = bytes_of(unsharded_base if isinstance(unsharded_base, torch.Tensor) else unsharded_base.codes) / 6
    with Gathered(room=weight_bytes) as step:
        dl.value_and_grad(loss)(trainable)
    with Gathered() as switch:
        switched, _ = dl.switch(sharded, dl.schedules.every(1)(1, sharded))
        dl.merge(switched)
    return {
        "share": sum(leaf.untyped_storage().nbytes() for leaf in tree_leaves(sharded_base)) / bytes_of(unsharded_base),
        "step": step,
        "one": weight_bytes,
        "predicted": dl.parallel.wire_bytes(trainable, frozen).bases,
        "switch": switch.total,
    }


@pytest.mark.parametrize(("base", "residual"), [(None, None), ("int8", "bfloat16")])
def test_a_quarter_is_held_one_weight_is_gathered_at_a_time_and_a_switch_sends_nothing(base, residual):
    for found in in_processes(4, _numbers, base, residual):
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
    unsharded_base = params[name].base

    def step(state, x):
        trainable, frozen = state

        def loss(trainable):
            return dl.call(model, dl.combine(trainable, frozen), x).square().mean()

        loss, grads = dl.parallel.all_reduce_mean(tuple(dl.value_and_grad(loss)(trainable)), group)
        return (dl.apply_updates(trainable, tree_map(lambda leaf: -leaf, grads)), frozen), loss

    state, x = dl.partition(dl.parallel.shard(params, group)), torch.ones(64, 18)
    expected = [step(state, x)[1]]
    expected.append(step(step(state, x)[0], x)[1])
    # With reuse of buffers, the storage of a gathered tensor would stay alive for later tensors.
    compiled = dl.compile_step(step, options={"allow_buffer_reuse": False})
    state = tuple(state)
    losses = [compiled(state, x).aux]
    packet, weight_bytes = torch.ops._c10d_functional.all_gather_into_tensor, bytes_of(_codes(unsharded_base)) / 3
    gather, gathered = packet.default, Gathered(room=weight_bytes * 20 / 18)

    def watched(*args):
        result = gather(*args)
        gathered.note(result)
        return result

    packet.default = watched  # the generated code looks it up as it runs
    losses.append(compiled(state, x).aux)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    return {"one": weight_bytes, "most": gathered.most, "total": gathered.total}


def _codes(base):
    return base if isinstance(base, torch.Tensor) else base.codes


@pytest.mark.slow
@pytest.mark.inductor
def test_compiled_one_weight_is_gathered_at_a_time():
    """On four processes the rows must be padded."""
    for found in in_processes(4, _compiled_numbers, "int8", "bfloat16"):
        padded = found["one"] * 20 / 18
        assert found["total"] == pytest.approx(2 * 3 * padded)
        assert 0 < found["most"] <= padded


def _dtensors() -> None:
    group = torch.distributed.group.WORLD
    params = fresh("int8", "bfloat16")
    sharded = dl.parallel.shard(params, group)
    placed = dl.parallel.as_dtensors({"params": sharded})
    for name in ("3.weight", "*.*.weight"):
        base = params[name].base
        for field, leaf in (("codes.codes", base.codes.codes), ("residual", base.residual)):
            placed_leaf = placed[f"['params'][{name!r}].base.base.{field}"]
            assert placed_leaf.shape == leaf.shape
            assert torch.equal(placed_leaf.full_tensor(), leaf)
    placed["['params']['3.weight'].base.base.codes.codes"].to_local().zero_()
    assert not sharded["3.weight"].base.base.codes.codes.any()  # the same memory


def test_dtensors_have_the_whole_ones_shape_and_the_shards_memory():
    in_processes(2, _dtensors)
