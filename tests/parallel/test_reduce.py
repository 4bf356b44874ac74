"""Several processes: gradients are reduced once, and a switch sends no message."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._pytree import tree_leaves, tree_map

import dynlora_fn as dl
from tests.support.data_parallel import fresh, model
from tests.support.processes import in_processes
from tests.support.traffic import Traffic

SCHEDULE = dl.schedules.switchlora(200, interval=10, ratio=1.0)


def make_step(net: nn.Module, group=None, share=None):
    optimizer = dl.optim.adamw()

    def step(state, tokens, lr, plan):
        trainable, frozen, opt_state = state

        def loss_fn(trainable):
            logits = dl.call(net, dl.combine(trainable, frozen), tokens[:, :-1])
            return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

        result = tuple(dl.value_and_grad(loss_fn)(trainable))
        loss, grads = result if group is None else dl.parallel.all_reduce_mean(result, group, weight=share)
        params, _ = dl.switch(dl.combine(trainable, frozen), plan)
        opt_state = dl.project_optimizer_state(opt_state, plan)
        trainable, frozen = dl.partition(params)
        updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=lr)
        return (dl.apply_updates(trainable, updates), frozen, opt_state), loss

    return step


def start(params: dict) -> tuple:
    trainable, frozen = dl.partition(params)
    return trainable, frozen, dl.optim.adamw().init(trainable)


def batch(step: int) -> torch.Tensor:
    return torch.randint(11, (12, 7), generator=torch.Generator().manual_seed(step))


def train(state, step, steps, rows=slice(None)):
    losses, lr, switched = [], torch.tensor(1e-2), 0
    for index in range(steps):
        params = dl.combine(*state[:2])
        switched += SCHEDULE.switches(index, params)
        state, loss = step(state, batch(index)[rows], lr, SCHEDULE(index, params))
        losses.append(loss.item())
    return state, losses, switched


def bits(tree) -> list[bytes]:
    return [leaf.contiguous().flatten().view(torch.uint8).numpy().tobytes() for leaf in tree_leaves(tree)]


def _reduce_trees() -> dict:
    process, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    tree = {
        "x": torch.arange(6.0).reshape(2, 3) * (process + 1),
        "y": (torch.ones(3, dtype=torch.float64) * process, torch.tensor(float(process))),
        "empty": torch.zeros(0, 2),
        "half": torch.full((2, 1), process + 1.0, dtype=torch.bfloat16),
    }
    before = copy.deepcopy(tree)
    with Traffic() as traffic:
        mean = dl.parallel.all_reduce_mean(tree, group)
    by_mesh = dl.parallel.all_reduce_mean(tree, mesh)
    shared = dl.parallel.all_reduce_mean(tree, group, weight=[0.25, 0.75][process])
    compiled = torch.compile(
        lambda tree: dl.parallel.all_reduce_mean(tree, group), fullgraph=True, backend="aot_eager"
    )(tree)
    assert bits(tree) == bits(before)
    assert bits(mean) == bits(by_mesh) == bits(compiled)
    return {"mean": mean, "shared": shared, "calls": traffic.calls}


def test_a_mean_takes_one_reduction_for_each_dtype():
    first, second = in_processes(2, _reduce_trees)
    assert bits(first["mean"]) == bits(second["mean"])
    assert first["calls"] == {"all_reduce": 3}
    x = torch.arange(6.0).reshape(2, 3)
    expected = {
        "x": 1.5 * x,
        "y": (torch.full((3,), 0.5, dtype=torch.float64), torch.tensor(0.5)),
        "empty": torch.zeros(0, 2),
        "half": torch.full((2, 1), 1.5, dtype=torch.bfloat16),
    }
    torch.testing.assert_close(first["mean"], expected, rtol=0, atol=0)
    torch.testing.assert_close(second["shared"]["x"], 1.75 * x, rtol=0, atol=0)
    torch.testing.assert_close(second["shared"]["y"][1], torch.tensor(0.75), rtol=0, atol=0)


def _train_in_parallel(steps: int) -> dict:
    process, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    group = torch.distributed.group.WORLD
    rows = range(12)[process * 12 // world_size : (process + 1) * 12 // world_size]
    net = model()
    step = make_step(net, group, share=len(rows) / 12)
    state = start(fresh(net))
    with Traffic() as traffic:
        state, losses, switched = train(state, step, steps, slice(rows.start, rows.stop))
    dl.parallel.check_replicas(state, group)
    return {
        "state": bits(state),
        "losses": losses,
        "calls": traffic.calls,
        "bytes": traffic.bytes,
        "switched": switched,
        "wire": dl.parallel.wire_bytes(state[0]),
    }


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4, 5])  # five divide no batch of twelve
def test_losses_are_those_of_one_process_and_switching_sends_nothing(size: int):
    steps = 200 if size == 4 else 40
    net = model()
    _, alone, switched = train(start(fresh(net)), make_step(net), steps)
    found = in_processes(size, _train_in_parallel, steps)
    assert switched >= (200 if size == 4 else 60)
    for result in found:
        assert result["state"] == found[0]["state"]
        assert result["losses"] == found[0]["losses"]
        assert result["switched"] == switched
        # One message a step, the loss in it: a switch has none.
        assert result["calls"] == {"all_reduce": steps}
        assert result["bytes"] == {"all_reduce": steps * (result["wire"].reduced + 4)}
    torch.testing.assert_close(torch.tensor(found[0]["losses"]), torch.tensor(alone), rtol=1e-4, atol=0)


def _compiled_steps() -> tuple:
    process, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    net, rows = model(), slice(6 * process, 6 * process + 6)
    params = dl.init(net, rank=4, seed=0, targets=["1.0.weight", "2.0.weight"], base="int8")
    eager, losses, _ = train(start(params), make_step(net, group), 4, rows)
    step = dl.compile_step(make_step(net, group), backend="aot_eager")
    state, compiled_losses, _ = train(start(dl.parallel.shard(params, group)), step, 4, rows)
    return (losses, compiled_losses), (eager[0], state[0])


@pytest.mark.slow
def test_reduction_and_gathering_go_into_a_compiled_step():
    for losses, trainables in in_processes(2, _compiled_steps):
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(*trainables, rtol=1e-3, atol=1e-5)


def _without_data() -> list:
    """Average on three processes. The last has no data."""
    process, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    weight, is_empty = [0.25, 0.75, 0.0][process], process == 2
    tree = {"loss": torch.tensor(process + 1.0), "grad": torch.tensor([process + 1.0, 0.0])}
    if is_empty:
        tree = tree_map(lambda leaf: torch.full_like(leaf, torch.nan), tree)
        tree["grad"][1] = torch.inf
    weights = [weight, torch.tensor(weight), torch.tensor(weight, dtype=torch.float64)]
    means = [dl.parallel.all_reduce_mean(tree, group, weight=each) for each in weights]
    for each in weights[:2]:
        compiled = torch.compile(
            lambda tree, each=each: dl.parallel.all_reduce_mean(tree, group, weight=each),
            fullgraph=True,
            backend="aot_eager",
        )
        means.append(compiled(tree))
    return means


def test_a_process_without_data_counts_as_zero():
    for means in in_processes(3, _without_data):
        for mean in means:
            torch.testing.assert_close(mean["loss"], torch.tensor(1.75), rtol=0, atol=0)
            torch.testing.assert_close(mean["grad"], torch.tensor([1.75, 0.0]), rtol=0, atol=0)


def _sharded_without_data() -> tuple:
    """Take gradients of sharded factors on three processes with 2, 1 and no rows of a batch."""
    process, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    weight, x = [2 / 3, 1 / 3, 0][process], torch.arange(12.0).reshape(3, 4)
    params = dl.init(nn.Linear(4, 5), rank=2, seed=0, targets=["weight"])
    sharded = dl.parallel.shard_factors(dl.parallel.shard(params, group), weight=weight)

    def mean_grads(params: dict, x: torch.Tensor) -> tuple:
        trainable, frozen = dl.partition(params)

        def loss(trainable):
            return dl.linear(x, dl.combine(trainable, frozen)["weight"]).square().mean()

        return tuple(dl.value_and_grad(loss)({"weight": trainable["weight"]}))

    local = mean_grads(sharded, x[[slice(0, 2), slice(2, 3), slice(3, 3)][process]])
    loss, grads = dl.parallel.all_reduce_mean(local, group, weight=weight)
    expected_loss, expected = mean_grads(params, x)
    torch.testing.assert_close(loss, expected_loss)
    sharding = grads["weight"].sharding
    torch.testing.assert_close(grads["weight"].b, expected["weight"].b[sharding.local_rows])
    torch.testing.assert_close(grads["weight"].a, expected["weight"].a[:, sharding.as_columns.local_rows])
    return process, bits(loss)


def test_gradients_of_sharded_factors_leave_out_a_process_without_data():
    in_processes(3, _sharded_without_data)


def _refused_means() -> None:
    process, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    grads = {"w": torch.ones(2)}
    for weight in (-0.1, 1.5, float("nan"), float("inf"), -1, 2):
        with pytest.raises(ValueError, match=rf"`weight` is {weight}; use a number from 0 to 1"):
            dl.parallel.all_reduce_mean(grads, group, weight=weight)
    with pytest.raises(ValueError, match=r"`weight` has shape \(1,\); use a number or a 0-d tensor"):
        dl.parallel.all_reduce_mean(grads, group, weight=torch.ones(1))
    for leaf, error in (
        (
            torch.ones(2, dtype=torch.int64),
            r"a tensor of dtype torch.int64 at \['x'\]\[1\], in which a mean is rounded",
        ),
        (torch.tensor(True), r"a tensor of dtype torch.bool at \['x'\]\[1\]"),
        (
            torch.ones(2).to(torch.float8_e5m2),
            r"a tensor of dtype torch.float8_e5m2 at .*; convert it to a floating dtype",
        ),
        (torch.eye(2).to_sparse(), r"a tensor of layout torch.sparse_coo at \['x'\]\[1\]; pass a dense one"),
        (0.5, r"0.5 at \['x'\]\[1\], which is not a tensor"),
        (None, r"None at \['x'\]\[1\], which is not a tensor"),
    ):
        with pytest.raises(TypeError, match=f"`tree` has {error}"):
            dl.parallel.all_reduce_mean({"x": [torch.ones(2), leaf]}, group)
    params = dl.parallel.shard(dl.init(nn.Linear(4, 5), rank=2, seed=0, targets=["weight"]), group)
    for weight in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"`weight` is {weight}; use a number from 0 to 1"):
            dl.parallel.shard_factors(params, weight=weight)
    sharded = dl.parallel.shard_factors(params, weight=[0.25, 0.75][process])
    grads = {"nested": [dl.partition(sharded).trainable]}
    where = r"sharded factors at \['nested'\]\[0\]\['weight'\]"
    for weight in (None, 1 - [0.25, 0.75][process], torch.tensor([0.25, 0.75][process])):
        with pytest.raises(ValueError, match=rf"`weight` .* does not apply to the {where}.*`shard_factors\(weight=\)`"):
            dl.parallel.all_reduce_mean(grads, group, weight=weight)
    reduced = dl.parallel.all_reduce_mean(grads, group, weight=[0.25, 0.75][process])
    assert bits(reduced["nested"][0]["weight"]) == bits(grads["nested"][0]["weight"])
    same, alone = torch.distributed.new_group([0, 1]), [torch.distributed.new_group([each]) for each in range(2)]
    dl.parallel.all_reduce_mean(grads, same, weight=[0.25, 0.75][process])
    with pytest.raises(ValueError, match=rf"`group` .* has other processes than .*, over which the {where}"):
        dl.parallel.all_reduce_mean(grads, alone[process], weight=[0.25, 0.75][process])


def test_what_would_be_averaged_wrongly_is_refused():
    in_processes(2, _refused_means)
