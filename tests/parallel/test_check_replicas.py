"""Processes that have drifted apart are found and named."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._pytree import tree_map

import dynlora_fn as dl
from dynlora_fn.parallel._check_replicas import checksums
from tests.support.processes import in_processes

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.int8])


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int8])
def test_changes_of_two_numbers_do_not_cancel(dtype: torch.dtype):
    def checksum(*numbers: int) -> int:
        return checksums([torch.tensor(numbers, dtype=dtype)]).item()

    changes = [(1, 2), (-1, -2), (2, 1), (-1, 2), (1, -2), (4, 1), (7, 0), (0, 0), (0, 3)]
    assert len({checksum(*numbers) for numbers in changes}) == len(changes)


def test_the_checksum_is_a_sum_of_splitmix_words():
    """The state of SplitMix64 with seed 0 is 0x9E3779B97F4A7C15 first, and its output is known."""
    state = torch.tensor([0x9E3779B97F4A7C15 - 2**64])
    assert checksums([state]).item() % 2**64 == 0xE220A8397B1DCDAF
    twice = 4 * 0xE220A8397B1DCDAF % 2**64  # factors 1 and 3
    assert checksums([state.repeat(2)]).item() % 2**64 == twice


def test_checksums_of_views_and_of_nothing():
    matrix = torch.arange(12.0).reshape(3, 4)
    assert checksums([matrix.mT.contiguous().mT, matrix])[0] == checksums([matrix])
    assert checksums([torch.zeros(2, 0), torch.zeros(())]).tolist() == [0, 0]


def _drifted() -> list[str]:
    process, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    group = torch.distributed.group.WORLD
    state = {"mu": torch.ones(3, 2), "count": [torch.tensor(7), torch.zeros(4, dtype=torch.bfloat16)]}
    params = dl.parallel.shard(dl.init(nn.Linear(4, 4, bias=False), rank=1, seed=0, targets=["weight"]), group)
    dl.parallel.check_replicas(
        (state, params), init_device_mesh("cpu", (world_size,))
    )  # though the rows of the base differ
    messages = []
    for drifted in ([2], [1, 2], list(range(1, world_size)), range(world_size)):
        count = torch.tensor(7 + (process if drifted == range(world_size) else process in drifted))
        with pytest.raises(dl.parallel.DriftedError) as error:
            dl.parallel.check_replicas({**state, "count": [count, state["count"][1]]}, group)
        messages.append(str(error.value))
    return messages


def test_processes_that_have_drifted_are_named():
    messages = in_processes(5, _drifted)
    assert all(other == messages[0] for other in messages)
    differs = "differs from the majority, first at ['count'][0]; resume from a checkpoint"
    assert messages[0] == [
        f"`state` of processes [2] {differs}",
        f"`state` of processes [1, 2] {differs}",
        f"`state` of processes [0] {differs}",
        "`state` differs between processes without a majority, first at ['count'][0], and the processes with equal"
        " states are [[0], [1], [2], [3], [4]]; resume from a checkpoint",
    ]


def _values() -> None:
    process, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    same = {
        "nan": torch.tensor([torch.nan, torch.inf, -0.0]),
        "numbers": (math.nan, 1, True, 2j, "text", b"x", None, torch.bfloat16, torch.Size([2])),
        "complex": torch.tensor([1 + 2j, 3j], dtype=torch.complex128).conj(),
        "bool": torch.tensor([True, False]),
        "empty": (torch.zeros(0, 2), {}, (), []),
    }
    dl.parallel.check_replicas(same, group)
    for state in ({}, {"step": 3}, 3, torch.ones(2), (), None):
        dl.parallel.check_replicas(state, group)
    for name, leaf in (
        ("nan", torch.tensor([torch.nan, torch.inf, 0.0])),  # equal to -0.0, with other bits
        ("complex", torch.tensor([1 + 2j, 3j], dtype=torch.complex128)),
        ("bool", torch.tensor([True, True])),
    ):
        with pytest.raises(
            dl.parallel.DriftedError, match=rf"processes \[0\] differs .*, first at \['{name}'\]; resume"
        ):
            dl.parallel.check_replicas({**same, name: leaf} if process == 0 else same, group)


def test_bits_are_compared_and_equal_nans_are_equal():
    in_processes(3, _values)


def _without_values() -> None:
    process, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    params = dl.bases.defer(dl.init({"w": torch.ones(4, 4)}, rank=2, seed=0, targets=["w"]), vectors=2)
    sharded = _sharded()
    for state in (params, sharded, {"x": torch.ones(2, device="meta")}):
        dl.parallel.check_replicas(state, group)
    meta = {"x": torch.ones(2, device="meta" if process else "cpu")}
    with pytest.raises(dl.parallel.DriftedError, match=r"\['x'\]: torch.float32 \(2,\) on meta in dict"):
        dl.parallel.check_replicas(meta, group)
    base = params["w"].base
    other = base._replace(divisor=replace(base.divisor, value=2 + process))
    with pytest.raises(dl.parallel.DriftedError, match=r"\.divisor: .*value=3.* in Deferred"):
        dl.parallel.check_replicas(other, group)


def test_constants_and_tensors_without_values_are_compared():
    in_processes(2, _without_values)


def _without_a_majority() -> str:
    with pytest.raises(dl.parallel.DriftedError) as error:
        dl.parallel.check_replicas({"step": torch.distributed.get_rank()}, torch.distributed.group.WORLD)
    return str(error.value)


def test_two_processes_have_no_majority():
    first, second = in_processes(2, _without_a_majority)
    assert first == second
    assert first == (
        "`state` differs between processes without a majority, first at ['step']: int 1 in dict instead of"
        " ['step']: int 0 in dict, and the processes with equal states are [[0], [1]];"
        " pass the same state on every process, or resume from a checkpoint"
    )


def _not_comparable() -> None:
    group = torch.distributed.group.WORLD
    sharded = _sharded()
    norms = tree_map(torch.linalg.vector_norm, dl.partition(sharded).trainable)
    placed = dl.parallel.as_dtensors(sharded)
    for state, reason in (
        ({"optimizer": [object()]}, r"it has a object at \['optimizer'\]\[0\]"),
        ({"f": len}, r"it has a builtin_function_or_method at \['f'\]"),
        ({"x": torch.eye(2).to_sparse()}, r"it has a Tensor at \['x'\]"),
        (placed, r"it has a DTensor at \[.*weight.*\]"),
        (norms, r"a tensor of shape \(\) in the ShardedFactors at \['weight'\] is not a shard"),
    ):
        with pytest.raises(TypeError, match=f"`state` cannot be compared: {reason}.*; remove it, or pass its tensors"):
            dl.parallel.check_replicas(state, group)


def test_what_cannot_be_compared_is_refused_by_its_path():
    in_processes(2, _not_comparable)


def _sharded(columns: int = 4, rank: int = 1, dtype: torch.dtype = torch.float32) -> dict:
    """Return one weight of five rows with sharded factors. The processes have three rows and two."""
    linear = nn.Linear(columns, 5, bias=False)
    params = dl.init(linear, rank=rank, seed=0, targets=["weight"], dtype=dtype)
    return dl.parallel.shard_factors(dl.parallel.shard(params, torch.distributed.group.WORLD))


def _shards() -> list[str]:
    process, group, messages = torch.distributed.get_rank(), torch.distributed.group.WORLD, []
    trainable, frozen = dl.partition(_sharded())
    state = trainable, frozen, dl.optim.adamw(moments="8bit").init(trainable)
    dl.parallel.check_replicas(state, group)
    factors = trainable["weight"]
    alone = factors._replace(
        sharding=replace(factors.sharding, world_size=1, process=0, rows=factors.b.shape[-2], columns=2)
    )
    whole = factors._replace(sharding=replace(factors.sharding, columns=6))
    for other in (
        dl.partition(_sharded(columns=6)).trainable,
        dl.partition(_sharded(rank=2)).trainable,
        dl.partition(_sharded(dtype=torch.float64)).trainable,
        {"weight": dl.Factors(factors.b, factors.a)},
        {"weight": alone},
        {"weight": whole},
    ):
        with pytest.raises(dl.parallel.DriftedError) as error:
            dl.parallel.check_replicas(other if process == 1 else trainable, group)
        messages.append(str(error.value).split(" instead of ")[0].split("first at ")[1])
    other_seed = frozen["weight"]._replace(seed=frozen["weight"].seed + process)
    with pytest.raises(dl.parallel.DriftedError, match=r"first at .*\['weight'\]\.seed, and the processes"):
        dl.parallel.check_replicas({"weight": other_seed}, group)
    return messages


def test_shards_are_compared_by_the_sizes_of_the_whole():
    for messages in in_processes(2, _shards):
        assert messages == [
            "['weight'].a: torch.float32 (1, 6) in dict, ShardedFactors over 2",
            "['weight'].b: torch.float32 (5, 2) in dict, ShardedFactors over 2",
            "['weight'].b: torch.float64 (5, 1) in dict, ShardedFactors over 2",
            "['weight'].b: torch.float32 (2, 1) in dict, Factors",
            "['weight'].b: torch.float32 (2, 1) in dict, ShardedFactors over 1",
            "['weight']: no shards in dict",
        ]
