"""The difference between a quantized base and its products is measured."""

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.utils._pytree import tree_leaves

import dynlora_fn as dl
from dynlora_fn import switch
from dynlora_fn.bases import drift, quantize
from dynlora_fn.testing import Shape, exact_weight, low_rank, plan_of
from tests.support.quantized import RESIDUALS, Net
from tests.support.strategies import quantized_params


@given(quantized_params())
def test_drift_is_what_products_miss(param):
    exact, approximate = exact_weight(param), dl.materialize(param)
    missed = (approximate.double() - exact).norm() / exact.norm()
    if isinstance(param.base, Tensor) or not tree_leaves(param.base.residual):
        assert drift(param).isnan()
    else:
        # Two sums and a norm, in the factors' dtype and at least in float32.
        torch.testing.assert_close(drift(param).double(), missed, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(drift(param, exact).double(), missed, rtol=1e-3, atol=1e-6)


def test_drift_is_reported_by_name():
    params = dl.init(Net(), rank=4, seed=0, targets=["*weight"], base="int8")
    found = drift(params)
    assert found.keys() == {"layers.*.weight", "head.weight"}
    assert all(0 < value < 0.02 for value in found.values())
    dense = dl.materialize({**dl.init(Net(), rank=4, seed=0, targets=["*weight"])})
    assert drift(params, dense).keys() == found.keys()


@pytest.mark.slow
def test_a_residual_keeps_drift_from_growing():
    """After two thousand folds the error equals the one of one fold with a residual, and many times larger without."""
    weight = low_rank(Shape(64, 64, 16), base_dtype=torch.float64, factor_dtype=torch.float32)
    params = {"exact": weight} | {str(residual): quantize(weight, "int8", residual=residual) for residual in RESIDUALS}
    for seed in range(2000):
        params = switch(params, dict.fromkeys(params, plan_of(16, b=1, a=1, seed=seed))).params
    weight = params.pop("exact")
    drifts = drift(params, dict.fromkeys(params, dl.materialize(weight)))
    once = drift(quantize(weight, "int8", residual=None), dl.materialize(weight))
    assert drifts["bfloat16"] < 1.02 * once
    assert drifts["int8"] < 1.2 * once
    assert drifts["None"] > 10 * once


def test_an_exact_weight_that_is_missing_or_of_another_shape_is_refused():
    params = {"w": low_rank(Shape(8, 16, 4))}
    with pytest.raises(ValueError, match=r"`exact` has no weight for \['w'\]; pass one for each low-rank weight"):
        drift(params, {})
    for shape in ((1, 16), (16, 8), (8, 1)):
        with pytest.raises(ValueError, match=r"`exact` has shape .* for 'w', but the weight has \(8, 16\)"):
            drift(params, {"w": torch.zeros(shape)})


def test_zeros_have_no_drift():
    params = dl.init({"w": torch.zeros(8, 8)}, rank=2, seed=0, targets=["w"], start="lora", base="int8")
    assert drift(params)["w"] == drift(params, {"w": torch.zeros(8, 8)})["w"] == 0


def test_an_unknown_drift_is_in_float32_too():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert drift(low_rank(Shape(4, 4, 2))).dtype == torch.float32
    finally:
        torch.set_default_dtype(before)
