"""A base keeps the dtypes of its format. Codes that were converted are refused and not misread."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import dynlora_fn as dl
from dynlora_fn.bases._base import as_base
from dynlora_fn.bases._formats import FORMATS, as_format
from dynlora_fn.testing import Shape, Storage, assert_same, low_rank, untouched

SHAPE, DTYPES = Shape(8, 64, 2), (torch.float64, torch.float16)


def weight(kind: str, residual: Any = "bfloat16") -> dl.LowRank:
    return low_rank(SHAPE, storage=Storage(kind, residual), factor_dtype=torch.float32)


def converted(tree: Any, dtype: torch.dtype) -> Any:
    """Convert every floating tensor, as one would convert plain parameters."""
    return tree_map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, tree)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_converted_codes_are_refused_by_name(kind: str, dtype: torch.dtype):
    deferred = dl.bases.defer(weight(kind), vectors=4)
    for param in (weight(kind), deferred):
        params = {"w": converted(param, dtype)}
        for transform in (dl.merge, dl.materialize, dl.partition, dl.bases.drift, lambda p: dl.decay(p, 0.1)):
            with pytest.raises(TypeError, match=r"`params` has a tensor of dtype .* in the base of 'w'; convert only"):
                transform(params)


def test_codes_and_residuals_of_every_format_are_accepted():
    for kind in FORMATS:
        for residual in ("bfloat16", "int8", None):
            param = weight(kind, residual)
            changed = dl.decay(dl.switch(param, dl.schedules.every(1)(0, {"w": param})["w"]).param, 0.1)
            for each in (param, changed):
                assert as_base(each.base).wrong_dtype is None
                dl.partition({"w": each})


def test_factors_can_be_converted():
    param = weight("int8")
    wide = param._replace(factors=converted(param.factors, torch.float64))
    error = dl.materialize(wide) - dl.materialize(param)
    assert error.abs().max() < 1e-5


@pytest.mark.parametrize("kind", FORMATS)
def test_decoded_and_encoded_weights_share_no_memory_with_codes(kind: str):
    codes = as_format(weight(kind).base.codes if kind != "bfloat16" else torch.ones(8, 64))
    wide = converted(codes, torch.float64) if kind in ("int8", "float8") else codes
    with untouched(list(wide)):
        first, second = (wide.decode(torch.float64) for _ in range(2))
    assert_same(first, second)
    dense = torch.ones(8, 64)
    with untouched(dense):
        for tensor in codes.encode(dense):
            assert isinstance(tensor, Tensor)
            tensor.zero_()
