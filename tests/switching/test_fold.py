"""A product that is folded in is added to the weight, and nothing else changes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynlora_fn.switching import fold
from dynlora_fn.testing import (
    STORAGES,
    Shape,
    assert_same,
    assert_within,
    check_compiles,
    check_vmap,
    dtypes,
    eps,
    exact_weight,
    low_rank,
    low_rank_params,
    normal,
    rounding,
    untouched,
)

FITTING = Shape(16, 64, 4)


@given(low_rank_params(deferred=False), st.sampled_from([0, 1, 3, 40]), dtypes)
def test_a_product_is_added(param, count, dtype):
    *stack, out_features, in_features = param.shape
    b, a = normal(0, *stack, out_features, count, dtype=dtype), normal(1, *stack, count, in_features, dtype=dtype)
    with untouched(param, b, a):
        new = fold(param, b, a)
    assert_same((new.factors, new.seed), (param.factors, param.seed))
    rank = param.factors.b.shape[-1]
    product, size = b.double() @ a.double() / rank, b.double().abs() @ a.double().abs() / rank
    terms = (count + 3) * eps(torch.float32) * (size + size.amax((-2, -1), keepdim=True))
    assert_within(exact_weight(new), exact_weight(param) + product, rounding(param, new) + terms)


def test_a_deferred_base_waits():
    param = low_rank(Shape(6, 4, 2), waiting=3)
    b, a = normal(0, 6, 2), normal(1, 2, 4)
    new = fold(param, b, a)
    assert_same(new.base.pending.b[..., 1:], b)
    assert_within(exact_weight(new), exact_weight(param) + b @ a / 2, 1e-12)
    with pytest.raises(ValueError, match="`vectors` = 3 of deferred 'param' is less than the 4 vectors of one fold"):
        fold(param, normal(0, 6, 4), normal(1, 4, 4))


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_it_compiles_and_maps(storage):
    arguments = low_rank(FITTING, (2,), storage=storage), normal(0, 2, 16, 3), normal(1, 2, 3, 64)
    check_compiles(fold, arguments=arguments)
    check_vmap(fold, arguments=arguments)


@pytest.mark.parametrize(
    ("b", "a", "message"),
    [
        ((5, 1), (1, 4), r"`b` has shape \(5, 1\); a product for a weight of shape \(6, 4\) needs \(6, 1\)"),
        ((6, 1), (2, 4), r"`a` has shape \(2, 4\); a product for a weight of shape \(6, 4\) needs \(1, 4\)"),
        ((2, 6, 1), (1, 4), r"`b` has shape \(2, 6, 1\)"),
        ((), (1, 4), r"`b` has shape \(\)"),
    ],
)
def test_other_shapes_are_refused(b, a, message):
    with pytest.raises(ValueError, match=message):
        fold(low_rank(Shape(6, 4, 2)), torch.zeros(b), torch.zeros(a))
