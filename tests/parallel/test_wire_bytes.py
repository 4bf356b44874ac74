"""The bytes that a step sends are counted."""

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
