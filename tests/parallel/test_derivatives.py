"""Collectives do not lose a tangent without an error."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.func import jvp

from dynlora_fn.optim import clip_by_global_norm, muon
from dynlora_fn.parallel import all_reduce_mean, shard, shard_factors
from dynlora_fn.testing import Shape, low_rank, normal


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    """Run each test in a group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_forward_mode_through_a_collective_is_refused():
    factors = shard_factors(shard({"w": low_rank(Shape(6, 8, 2))}, dist.group.WORLD))["w"].factors
    tree, optimizer = {"w": factors}, muon()
    opt_state = optimizer.init(tree)
    for function in (
        lambda tree: all_reduce_mean(tree["x"], dist.group.WORLD),
        lambda tree: clip_by_global_norm({"w": tree["w"]}, 1.0).norm,
        lambda tree: optimizer.update({"w": tree["w"]}, opt_state, {"w": factors}, lr=0.1).updates["w"].b,
    ):
        point = {**tree, "x": normal(0, 3)}
        with pytest.raises(NotImplementedError, match=r"sent to other processes is differentiated in forward mode"):
            jvp(function, (point,), (point,))


def test_gradients_of_reduced_tensors_have_torchs_formula():
    x = normal(0, 3).requires_grad_()
    gradient = torch.autograd.grad(all_reduce_mean({"x": x.sin()}, dist.group.WORLD)["x"].sum(), x)[0]
    torch.testing.assert_close(gradient, x.detach().cos())
