"""The fold of a difference: by outer products or by one matrix product, and in which precision."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dynlora_fn._core._dtypes import autocast_now, widest, without_autocast
from dynlora_fn.bases._fold import fold
from dynlora_fn.testing import Shape, low_rank, normal


class Counted(TorchDispatchMode):
    """Counts how often each operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def products(count: int) -> int:
    left, right = normal(0, 3, 5, count), normal(1, 3, count, 40)
    with Counted() as counted:
        fold(normal(2, 3, 5, 40), left, right, divisor=4)
    return counted.count["bmm"] + counted.count["mm"]


def test_up_to_32_vectors_are_outer_products_and_more_are_one_product():
    """One pass over the base in place is faster for few outer products and slower for many."""
    assert [products(count) for count in (0, 1, 32, 33, 64)] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("count", [1, 40])
def test_sums_are_formed_in_the_widest_dtype(count):
    """Bits of either factor that float32 would lose reach a base in float64."""
    base = torch.ones(2, 3)
    for left, right in ((1 + 2.0**-40, 1.0), (1.0, 1 + 2.0**-40)):
        pair = torch.full((2, count), left, dtype=torch.float64), torch.full((count, 3), right, dtype=torch.float64)
        got = fold(base, *pair, divisor=count, dtype=torch.float64)
        assert got.dtype == torch.float64
        assert (got - 2 > 2.0**-41).all()
    assert fold(base, *pair, divisor=count).dtype == torch.float32
    assert widest(torch.bfloat16) == torch.float32
    assert widest(torch.bfloat16, torch.float64) == torch.float64


@pytest.mark.parametrize("count", [1, 40])
def test_a_base_on_the_meta_device_is_folded_into(count):
    """The meta device has no autocast state to read."""
    meta = torch.device("meta")
    got = fold(
        torch.empty(4, 6, device=meta),
        torch.empty(4, count, device=meta),
        torch.empty(count, 6, device=meta),
        divisor=2,
    )
    assert (got.device, tuple(got.shape)) == (meta, (4, 6))
    assert autocast_now("meta") is None
    with without_autocast("meta"):
        pass


def test_a_stack_folds_as_its_members_do():
    param = low_rank(Shape(5, 7, 3), (2,))
    stacked = fold(param.base, *param.factors, divisor=3)
    for member in range(2):
        alone = fold(param.base[member], param.factors.b[member], param.factors.a[member], divisor=3)
        assert torch.equal(stacked[member], alone)
