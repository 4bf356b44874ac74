"""One low-rank weight is merged and made dense."""

import torch
from hypothesis import example, given
from torch.utils._pytree import tree_leaves

from dynlora_fn import LowRank, init, materialize, merge
from dynlora_fn.testing import Shape, assert_same, assert_within, eps, low_rank, untouched
from tests.support import reference
from tests.support.network import EPS, TARGETS, network
from tests.support.strategies import plain_params

THIRDS = low_rank(Shape(4, 5, 3), base_dtype=torch.float32, factor_dtype=torch.bfloat16)  # b / 3 is not in bfloat16


@given(plain_params())
@example(THIRDS)
def test_materialize_is_the_dense_weight(param):
    with untouched(param):
        weight = materialize(param)
    assert weight.dtype == reference.working_dtype(param)
    # rank products and sums, each product of a quotient
    bound = (param.factors.a.shape[-2] + 3) * eps(weight.dtype) * reference.magnitude(param)
    assert_within(weight, reference.weight(param), bound)


@given(plain_params())
@example(THIRDS)
def test_merge_keeps_the_weight(param):
    with untouched(param):
        merged = merge(param)
    assert not merged.factors.b.any()
    assert_same(merged.factors.a, param.factors.a)
    assert_same(merged.seed, param.seed)
    kinds = [[(leaf.shape, leaf.dtype) for leaf in tree_leaves(tree)] for tree in (param, merged)]
    assert kinds[0] == kinds[1]
    # As for `materialize`, and the base is rounded once more to its dtype.
    work = (param.factors.a.shape[-2] + 3) * eps(reference.working_dtype(param))
    bound = (work + eps(param.base.dtype)) * reference.magnitude(param)
    assert_within(reference.weight(merged), reference.weight(param), bound)


@given(plain_params())
def test_merging_twice_is_merging_once(param):
    assert_same(merge(merge(param)), merge(param))


def test_many_vectors_are_merged_as_well_as_few():
    """Beyond 32 vectors the sum is a matrix product."""
    param = low_rank(Shape(50, 40, 40), (2,))
    bound = 43 * EPS * reference.magnitude(param)
    assert_within(reference.weight(merge(param)), reference.weight(param), bound)
    assert_within(materialize(param), reference.weight(param), bound)


def test_transforms_of_dicts_leave_tensors_as_they_are():
    params = init(network(), rank=2, seed=0, targets=TARGETS, dtype=torch.float64)
    for name, param in params.items():
        if isinstance(param, LowRank):
            assert_same(materialize(params)[name], materialize(param))
            assert_same(merge(params)[name], merge(param))
        else:
            assert materialize(params)[name] is param
            assert merge(params)[name] is param
