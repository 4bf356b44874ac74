"""The bytes that a step sends are counted."""

import pytest
from torch.utils._pytree import tree_leaves

import dynlora_fn as dl
from tests.support.data_parallel import fresh, model


def test_bytes_are_the_trainable_share_of_full_ranks():
    params = fresh(model())
    trainable, frozen = dl.partition(params)
    wire = dl.parallel.wire_bytes(trainable, frozen)
    numbers = sum(leaf.numel() for leaf in tree_leaves(trainable))
    assert wire == dl.parallel.WireBytes(
        factors=4 * 3 * 4 * (18 + 18), full_rank=wire.reduced - 4 * 3 * 4 * 36, bases=0
    )
    assert wire.reduced == 4 * numbers
    trainable, _ = dl.partition(dl.init(model(), rank=1, seed=0, targets=[]))
    assert dl.parallel.wire_bytes(trainable).factors == 0
    assert dl.parallel.wire_bytes(trainable).full_rank == 4 * sum(leaf.numel() for leaf in model().parameters())


@pytest.mark.parametrize(
    ("kind", "nccl", "gloo"),
    [
        ("factors", 1.5, 1.5),
        ("full_rank", 1.5, 1.5),
        ("bases", 0.75, 0.75),
        ("gathered", 0.75, 0.75),
        ("scattered", 0.75, 1.5),
        ("switched", 0.75, 0.75),
    ],
)
def test_each_process_sends_what_the_algorithm_of_a_collective_sends(kind, nccl, gloo):
    """Of four processes in a ring each sends three quarters, and twice that in an all-reduce."""
    wire = dl.parallel.WireBytes(0, 0, 0)._replace(**{kind: 4000})
    assert wire.sent(4, backend="nccl") == 4000 * nccl
    assert wire.sent(4, backend="gloo") == wire.sent(4, backend=dl.parallel.register_gloo()) == 4000 * gloo
    assert wire.sent(1, backend="gloo") == 0


def test_what_an_unknown_backend_sends_is_refused():
    wire = dl.parallel.WireBytes(0, 0, 0)
    with pytest.raises(ValueError, match="`backend` must be 'nccl', 'gloo' or 'gloo_one_thread', got 'mpi'"):
        wire.sent(2, backend="mpi")
    with pytest.raises(ValueError, match="`world_size` is 0"):
        wire.sent(0, backend="nccl")
