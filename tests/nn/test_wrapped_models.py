"""A model inside a wrapper of torch's is refused."""

import pytest
import torch

import dynlora_fn as dl
from tests.support.processes import in_processes


@pytest.mark.slow
def test_a_wrapped_model_is_refused_with_the_reason():
    in_processes(1, _call_wrapped)


def _call_wrapped() -> None:
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard  # noqa: PLC0415
    from torch.nn.parallel import DistributedDataParallel  # noqa: PLC0415

    def fresh() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))

    mesh = init_device_mesh("cpu", (1,))
    params = dl.init(fresh(), rank=2, seed=0, targets=["*.weight"])
    inside = torch.nn.Sequential(DistributedDataParallel(fresh()[0]), fresh()[1])
    for model, message in (
        (DistributedDataParallel(fresh()), "`model` is wrapped in DistributedDataParallel"),
        (torch.nn.DataParallel(fresh()), "`model` is wrapped in DataParallel"),
        (fully_shard(fresh(), mesh=mesh), "`model` is wrapped in FSDPModule"),
        (
            FullyShardedDataParallel(fresh(), device_id=torch.device("cpu")),
            "`model` is wrapped in FullyShardedDataParallel",
        ),
        (inside, "submodule '0' of `model` is wrapped in DistributedDataParallel"),
    ):
        with pytest.raises(ValueError, match=f"^{message}, whose gradient hooks .*; pass the unwrapped module"):
            dl.call(model, params, torch.ones(1, 4))
    assert dl.call(fresh(), params, torch.ones(1, 4)).shape == (1, 4)
