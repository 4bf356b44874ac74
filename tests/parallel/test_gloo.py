"""Groups on gloo have one worker thread, because two can end the process."""

import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

import dynlora_fn as dl
from dynlora_fn._core._torch import gloo_with_one_thread
from tests.support.processes import in_processes

GATHERS = """
import sys, time
import torch
from torch import distributed
import dynlora_fn as dl

torch.set_num_threads(1)
distributed.init_process_group(dl.parallel.register_gloo(), store=distributed.HashStore(), rank=0, world_size=1)
operations, name, x = torch.ops._c10d_functional, distributed.group.WORLD.group_name, torch.arange(4.0)
end, count = time.monotonic() + float(sys.argv[1]), 0
while time.monotonic() < end:
    in_flight = [operations.all_gather_into_tensor(x + count, 1, name) for _ in range(2)]
    assert all(torch.equal(operations.wait_tensor(gathered), x + count) for gathered in in_flight)
    count += 1
assert count > 1000, count
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_gathers_in_flight_do_not_end_the_process():
    """With the two threads of torch's gloo the process dies after 5 to 20 seconds."""
    child = subprocess.run([sys.executable, "-c", GATHERS, "20"], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr


def _collectives() -> None:
    process, name = distributed.get_rank(), dl.parallel.register_gloo()
    assert dl.parallel.register_gloo() == name == distributed.get_backend()
    groups = [distributed.group.WORLD, distributed.new_group(backend=name), distributed.new_group([0, 2], backend=name)]
    for group in groups if process != 1 else groups[:2]:
        total = torch.tensor(1.0)
        distributed.all_reduce(total, group=group)
        assert total == group.size()
        objects: list = [None] * group.size()
        distributed.all_gather_object(objects, process, group=group)
        assert objects == distributed.get_process_group_ranks(group)
        distributed.barrier(group)
    from torch.distributed.tensor import Shard, distribute_tensor  # noqa: PLC0415 (takes a second to import)

    whole = torch.arange(7.0)
    assert torch.equal(distribute_tensor(whole, init_device_mesh("cpu", (3,)), [Shard(0)]).full_tensor(), whole)


def test_the_group_serves_objects_subgroups_and_meshes():
    in_processes(3, _collectives)


def test_the_group_has_one_thread_and_the_timeout_and_interfaces_of_the_caller(monkeypatch: pytest.MonkeyPatch):
    timeout = timedelta(seconds=7)
    options = gloo_with_one_thread(distributed.HashStore(), 0, 1, timeout).options
    assert (options._threads, options._timeout, len(options._devices)) == (1, timeout, 1)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,lo")
    options = gloo_with_one_thread(distributed.HashStore(), 0, 1, timeout).options
    assert (options._threads, len(options._devices)) == (1, 2)


def test_a_build_without_gloo_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distributed, "is_gloo_available", lambda: False)
    with pytest.raises(RuntimeError, match="torch was built without gloo"):
        dl.parallel.register_gloo()
