"""Processes that have drifted apart are found and named."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

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
        "`state` differs between processes without a majority, and the processes with equal states are"
        " [[0], [1], [2], [3], [4]]; resume from a checkpoint",
    ]
