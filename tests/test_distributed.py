"""Several processes: one reduction, no message for a switch, and the rank that has drifted."""

import copy
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import in_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dynlora_fn as dl
from dynlora_fn.parallel._check_replicas import checksums

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.int8])


class Traffic(TorchDispatchMode):
    """Counts collectives, and the bytes that are reduced or gathered."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if func.namespace.startswith("_c10d_functional") and "wait" not in name and "wrap" not in name:
            self.calls[name] += 1
            self.bytes[name] += result.numel() * result.element_size()
        return result


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(18, 18), nn.GELU()) for _ in range(3)]
    return nn.Sequential(nn.Embedding(11, 18), *layers, nn.Linear(18, 11))


def fresh(net: nn.Module, **options) -> dict:
    return dl.init(net, rank=4, seed=0, targets=["*.0.weight"], **options)


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
    for number in range(steps):
        params = dl.combine(*state[:2])
        switched += SCHEDULE.switches(number, params)
        state, loss = step(state, batch(number)[rows], lr, SCHEDULE(number, params))
        losses.append(loss.item())
    return state, losses, switched


def bits(tree) -> list[bytes]:
    return [leaf.contiguous().flatten().view(torch.uint8).numpy().tobytes() for leaf in tree_leaves(tree)]


# --- one reduction


def _reduce_trees() -> dict:
    rank, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    tree = {
        "x": torch.arange(6.0).reshape(2, 3) * (rank + 1),
        "y": (torch.ones(3, dtype=torch.float64) * rank, torch.tensor(float(rank))),
        "empty": torch.zeros(0, 2),
        "half": torch.full((2, 1), rank + 1.0, dtype=torch.bfloat16),
    }
    before = copy.deepcopy(tree)
    with Traffic() as traffic:
        mean = dl.parallel.all_reduce_mean(tree, group)
    by_mesh = dl.parallel.all_reduce_mean(tree, mesh)
    shared = dl.parallel.all_reduce_mean(tree, group, weight=[0.25, 0.75][rank])
    compiled = torch.compile(
        lambda tree: dl.parallel.all_reduce_mean(tree, group), fullgraph=True, backend="aot_eager"
    )(tree)
    assert bits(tree) == bits(before)
    assert bits(mean) == bits(by_mesh) == bits(compiled)
    return {"mean": mean, "shared": shared, "calls": traffic.calls}


def test_a_mean_takes_one_reduction_for_each_dtype():
    first, second = in_ranks(2, _reduce_trees)
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


# --- the same run on any number of processes


def _train_in_parallel(steps: int) -> dict:
    rank, size, group = torch.distributed.get_rank(), torch.distributed.get_world_size(), torch.distributed.group.WORLD
    rows = range(12)[rank * 12 // size : (rank + 1) * 12 // size]
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


@pytest.mark.parametrize("size", [2, 4, 5])  # five divide no batch of twelve
def test_losses_are_those_of_one_process_and_switching_sends_nothing(size: int):
    steps = 200 if size == 4 else 40
    net = model()
    _, alone, switched = train(start(fresh(net)), make_step(net), steps)
    found = in_ranks(size, _train_in_parallel, steps)
    assert switched >= (200 if size == 4 else 60)
    for one in found:
        assert one["state"] == found[0]["state"]
        assert one["losses"] == found[0]["losses"]
        assert one["switched"] == switched
        # One message a step, the loss in it: a switch has none.
        assert one["calls"] == {"all_reduce": steps}
        assert one["bytes"] == {"all_reduce": steps * (one["wire"].reduced + 4)}
    torch.testing.assert_close(torch.tensor(found[0]["losses"]), torch.tensor(alone), rtol=1e-4, atol=0)


def test_bytes_are_the_trainable_share_of_full_ranks():
    params = fresh(model())
    trainable, frozen = dl.partition(params)
    wire = dl.parallel.wire_bytes(trainable, frozen)
    numbers = sum(leaf.numel() for leaf in tree_leaves(trainable))
    assert wire == dl.parallel.WireBytes(
        factors=4 * 3 * 4 * (18 + 18), full_rank=wire.reduced - 4 * 3 * 4 * 36, bases=0
    )
    assert wire.reduced == 4 * numbers
    whole, _ = dl.partition(dl.init(model(), rank=1, seed=0, targets=[]))
    assert dl.parallel.wire_bytes(whole).factors == 0
    assert dl.parallel.wire_bytes(whole).full_rank == 4 * sum(leaf.numel() for leaf in model().parameters())


# --- inside of a compiled step


def _compiled_steps() -> tuple:
    rank, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    net, rows = model(), slice(6 * rank, 6 * rank + 6)
    params = dl.init(net, rank=4, seed=0, targets=["1.0.weight", "2.0.weight"], base="int8")
    eager, losses, _ = train(start(params), make_step(net, group), 4, rows)
    step = dl.compile_step(make_step(net, group), backend="aot_eager")
    state, compiled_losses, _ = train(start(dl.parallel.shard(params, group)), step, 4, rows)
    return (losses, compiled_losses), (eager[0], state[0])


def test_reduction_and_gathering_go_into_a_compiled_step():
    for losses, trainables in in_ranks(2, _compiled_steps):
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(*trainables, rtol=1e-3, atol=1e-5)


# --- whether they agree


@given(shapes, dtypes, st.integers(0, 2**16))
def test_a_checksum_tells_a_bit_and_two_numbers_that_are_exchanged(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int
):
    generator = torch.Generator().manual_seed(seed)
    leaf = torch.randint(-100, 100, shape, generator=generator).to(dtype)
    before = checksums([leaf])
    assert checksums([leaf.clone()]) == before
    if not leaf.numel():
        return
    raw = leaf.clone().reshape(-1).view(torch.uint8)
    raw[seed % len(raw)] ^= 1 << (seed % 8)
    assert checksums([raw.view(dtype).reshape(shape)]) != before
    numbers, other = leaf.flatten().clone(), seed % leaf.numel()
    numbers[[0, other]] = numbers[[other, 0]]
    if not torch.equal(numbers, leaf.flatten()):
        assert checksums([numbers.reshape(shape)]) != before


def test_checksums_of_views_and_of_nothing():
    matrix = torch.arange(12.0).reshape(3, 4)
    assert checksums([matrix.mT.contiguous().mT, matrix])[0] == checksums([matrix])
    assert checksums([torch.zeros(2, 0), torch.zeros(())]).tolist() == [0, 0]


def _drifted() -> list[str]:
    rank, size, group = torch.distributed.get_rank(), torch.distributed.get_world_size(), torch.distributed.group.WORLD
    state = {"mu": torch.ones(3, 2), "count": [torch.tensor(7), torch.zeros(4, dtype=torch.bfloat16)]}
    params = dl.parallel.shard(dl.init(nn.Linear(4, 4, bias=False), rank=1, seed=0, targets=["weight"]), group)
    dl.parallel.check_replicas((state, params), init_device_mesh("cpu", (size,)))  # though the rows of the base differ
    messages = []
    for drifted in ([2], [1, 2], list(range(1, size)), range(size)):
        own = torch.tensor(7 + (rank if drifted == range(size) else rank in drifted))
        with pytest.raises(dl.parallel.DriftedError) as error:
            dl.parallel.check_replicas({**state, "count": [own, state["count"][1]]}, group)
        messages.append(str(error.value))
    return messages


def test_processes_that_have_drifted_are_named():
    messages = in_ranks(5, _drifted)
    assert all(one == messages[0] for one in messages)
    differs = "differs from the majority, first at ['count'][0]; resume from a checkpoint"
    assert messages[0] == [
        f"`state` of processes [2] {differs}",
        f"`state` of processes [1, 2] {differs}",
        f"`state` of processes [0] {differs}",
        "`state` differs between processes without a majority, and the processes with equal states are"
        " [[0], [1], [2], [3], [4]]; resume from a checkpoint",
    ]
