"""What cannot be quantized is refused by name."""

import itertools
import re

import pytest
import torch
from torch.utils._pytree import tree_map

import dynlora_fn as dl
from dynlora_fn import merge, switch
from dynlora_fn.bases import quantize
from dynlora_fn.bases._formats import FORMATS
from dynlora_fn.testing import Shape, low_rank, plan_of
from tests.support.quantized import SHAPE, Net

BAD = [torch.nan, torch.inf, -torch.inf]
FINITE_ONLY = r".*; a base in low precision stores finite values only"


@pytest.mark.slow
def test_what_is_not_finite_is_refused_by_name():
    """One graph has weights of all formats, so the error also names the one that is not finite among them."""
    dense = {
        f"layers.*.{kind}": low_rank(SHAPE, (2,), seed, base_dtype=torch.float32, factor_dtype=torch.float32)
        for seed, kind in enumerate(FORMATS)
    }
    good = {name: quantize(param, kind) for (name, param), kind in zip(dense.items(), FORMATS, strict=True)}
    plan = dict.fromkeys(good, plan_of(4, b=2, a=2))
    compiled = torch.compile(switch, backend="aot_eager", fullgraph=True)
    compiled(good, plan)
    for (kind, name), value in itertools.product(zip(FORMATS, good, strict=True), BAD):
        refused = pytest.raises(ValueError, match=rf"weight '{re.escape(name)}' is not finite, {FINITE_ONLY}")
        bad = dense[name]._replace(base=dense[name].base.clone())
        bad.base[1, 3, 5] = value
        with refused:
            quantize({name: bad}, kind)
        bad = good[name]._replace(factors=tree_map(torch.clone, good[name].factors))
        bad.factors.b[1, 3] = value
        with refused:
            merge({name: bad})
        with refused:
            switch(good | {name: bad}, plan)
        with torch.compiler.set_stance("fail_on_recompile"), refused:
            compiled(good | {name: bad}, plan)


@pytest.mark.parametrize("value", BAD)
def test_a_model_that_is_not_finite_is_refused_by_name(value):
    weight = torch.ones(8, 16)
    weight[3, 5] = value
    with pytest.raises(ValueError, match=rf"weight 'fc\.weight' is not finite, with values from .*{value}"):
        dl.init({"fc.weight": weight}, rank=2, seed=0, targets=["*"], base="int8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"base": "int4"},
            r"unknown `base` 'int4'; use one of int8, float8, nf4, bfloat16, nvfp4 or mxfp4 \(proto.*, or ",
        ),
        ({"base": torch.int8}, r"unknown `base` torch\.int8; use one of"),
        ({"base": "int8", "residual": "float16"}, r"unknown `residual` 'float16'; use 'int8', 'bfloat16' or None"),
    ],
)
def test_quantize_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize(low_rank(SHAPE), **arguments)


@pytest.mark.parametrize("shape", [Shape(7, 16, 2), Shape(64, 7, 2)])
def test_sizes_that_nf4s_blocks_do_not_divide_are_refused(shape):
    with pytest.raises(ValueError, match=r"weight 'w' of shape \(.* needs a multiple of 64 entries and an even `in`"):
        quantize({"w": low_rank(shape)}, "nf4")


@pytest.mark.parametrize(("kind", "block", "shape"), [("nvfp4", 16, Shape(16, 24, 2)), ("mxfp4", 32, Shape(32, 16, 2))])
def test_rows_that_blocks_of_float4_do_not_divide_are_refused(kind, block, shape):
    message = rf"weight 'w' of shape \({shape.out_features}, {shape.in_features}\) does not fit {kind}, a prototype in "
    with pytest.raises(ValueError, match=message + f"torchao, .* a multiple of {block} as `in`"):
        quantize({"w": low_rank(shape)}, kind)


def test_both_kinds_of_bases_are_refused():
    with pytest.raises(
        ValueError, match=r"`base` is 'int8' and `base_dtype` is torch\.bfloat16; pass only one of them"
    ):
        dl.init(Net(), rank=2, seed=0, targets=["*weight"], base="int8", base_dtype=torch.bfloat16)
