"""Bases in low precision keep the weight to one quantization error, however often they are folded into."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dynlora_fn import Plan, merge, switch, unstack
from dynlora_fn.bases import quantize, to_torchao
from dynlora_fn.bases._base import as_base
from dynlora_fn.bases._formats import FORMATS
from dynlora_fn.testing import (
    assert_same,
    assert_within,
    eps,
    exact_weight,
    low_rank,
    plans,
    rounding,
    seeds,
    untouched,
)
from dynlora_fn.testing._shadow import exact_base, half_step
from tests.support.quantized import RESIDUALS, SHAPE
from tests.support.strategies import quantized_params

cases = quantized_params().flatmap(lambda param: st.tuples(st.just(param), plans(param), seeds))


@given(cases)
def test_products_see_what_is_kept_to_a_step_of_the_codes(case):
    param, plan, _ = case
    for variant in (param, switch(param, plan).param):
        assert_within(
            as_base(variant.base).dequantize(torch.float64), exact_base(variant.base), half_step(variant.base)
        )


@given(quantized_params())
def test_merging_twice_is_merging_once(param):
    merged = merge(param)
    assert not merged.factors.b.any()
    assert_same(merge(merged), merged)


@given(cases)
def test_a_plan_without_active_entries_is_the_identity(case):
    param, plan, _ = case
    sides = [side._replace(active=torch.zeros_like(side.active)) for side in (plan.b, plan.a)]
    assert_same(switch(param, Plan(*sides, frozen_for=plan.frozen_for)).param, param)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("kind", ["int8", "float8", "mxfp4", "bfloat16"])
def test_rows_that_a_fold_does_not_change_keep_every_bit(kind, residual):
    param = low_rank(SHAPE, (2,), base_dtype=torch.float32, factor_dtype=torch.float32)
    param.factors.b[:, ::2] = 0
    param = quantize(param, kind, residual=residual)
    if isinstance(param.base, Tensor):
        return
    got = merge(param)
    for new, old in zip(tree_leaves(got.base), tree_leaves(param.base), strict=True):
        assert_same(new[:, ::2], old[:, ::2])
    assert not torch.equal(
        as_base(got.base).dequantize(torch.float32)[:, 1::2], as_base(param.base).dequantize(torch.float32)[:, 1::2]
    )


@pytest.mark.parametrize("residual", ["bfloat16", "int8"])
@pytest.mark.parametrize("kind", FORMATS)
def test_quantizing_keeps_the_weight_from_format_to_format(kind, residual):
    """The residual is carried over, so the error is two residuals' roundings and not two formats' errors."""
    param = low_rank(SHAPE, (2,), base_dtype=torch.float32, factor_dtype=torch.float32)
    first = quantize(param, kind, residual=residual)
    assert_within(exact_base(first.base), param.base, rounding(param, first))
    second = quantize(first, "nf4", residual=residual)
    assert_within(exact_base(second.base), exact_base(first.base), rounding(first, second))


def test_a_residual_lies_where_it_is_asked_for():
    param = quantize(low_rank(SHAPE), "int8", residual="int8", residual_device="meta")
    assert {leaf.device.type for leaf in tree_leaves(param.base.residual)} == {"meta"}
    assert {leaf.device.type for leaf in tree_leaves(param.base.codes)} == {"cpu"}


def test_a_residual_without_data_stays_on_meta():
    param = tree_map(lambda leaf: leaf.to("meta"), low_rank(SHAPE))
    assert all(leaf.is_meta for leaf in tree_leaves(quantize({"w": param}, "int8", residual="int8")))
    with pytest.raises(ValueError, match="the weight 'w' is on meta, so `residual_device` cannot be 'cpu'"):
        quantize({"w": param}, "int8", residual="int8", residual_device="cpu")


@pytest.mark.parametrize("kind", ["int8", "float8", "nf4", "nvfp4", "mxfp4"])
def test_torchaos_tensor_is_of_a_dtype_that_it_knows(kind):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        quantized = quantize(low_rank(SHAPE, base_dtype=dtype), kind)
        wanted = torch.bfloat16 if dtype == torch.bfloat16 and kind != "nf4" else torch.float32
        assert to_torchao(quantized).dtype == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", FORMATS)
def test_quantizing_leaves_the_old_base_as_it_is(kind, dtype):
    param = low_rank(SHAPE, (2,), base_dtype=dtype)
    with untouched(param):
        quantized = quantize(param, kind)
    with untouched(quantized):
        quantize(quantized, "int8")
        to_torchao(unstack({"*": quantized})["0"])


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_slot_of_zeros_hides_no_other(kind):
    param = low_rank(SHAPE, (), base_dtype=torch.float32, factor_dtype=torch.float32)
    for side, axis in ((param.factors.b, 1), (param.factors.a, 0)):
        side.select(axis, 0).zero_()
        quantized = quantize(param, kind)
        merged = merge(quantized)
        assert_within(exact_weight(merged), exact_weight(quantized), rounding(quantized, merged))


@pytest.mark.parametrize("kind", ["int8", "float8", "mxfp4"])
def test_folds_of_next_to_nothing_leave_a_base_without_a_residual_as_it_is(kind):
    param = quantize(low_rank(SHAPE, (), base_dtype=torch.float32, factor_dtype=torch.float32), kind, residual=None)
    tiny = param.factors._replace(b=torch.full_like(param.factors.b, 1e-30))
    bases = []
    for _ in range(20):
        param = merge(param._replace(factors=tiny))
        bases.append(as_base(param.base).dequantize(torch.float32))
    torch.testing.assert_close(bases[-1], bases[0], rtol=40 * eps(torch.float32), atol=0)
