"""Bases in low precision keep the weight to one quantization error, however often they are folded into."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import quantized_params
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import dynlora_fn as dl
from dynlora_fn import Plan, merge, switch, unstack
from dynlora_fn.bases import drift, quantize, to_torchao
from dynlora_fn.bases._base import dequantize
from dynlora_fn.bases._float4 import BLOCKS
from dynlora_fn.bases._formats import NAMES
from dynlora_fn.testing import (
    Shape,
    assert_same,
    assert_within,
    eps,
    exact_weight,
    low_rank,
    normal,
    plan_of,
    plans,
    rounding,
    seeds,
    untouched,
)
from dynlora_fn.testing._shadow import half_step, kept

RESIDUALS = ("bfloat16", "int8", None)
SHAPE = Shape(8, 32, 4)  # of a size that all blocks divide


cases = quantized_params().flatmap(lambda param: st.tuples(st.just(param), plans(param), seeds))


@given(cases)
def test_products_see_what_is_kept_to_a_step_of_the_codes(case):
    param, plan, _ = case
    for one in (param, switch(param, plan).param):
        assert_within(dequantize(one.base, torch.float64), kept(one.base), half_step(one.base))


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
    assert not torch.equal(dequantize(got.base, torch.float32)[:, 1::2], dequantize(param.base, torch.float32)[:, 1::2])


@pytest.mark.parametrize("residual", ["bfloat16", "int8"])
@pytest.mark.parametrize("kind", NAMES)
def test_quantizing_keeps_the_weight_from_format_to_format(kind, residual):
    """What was missed goes over as well: two residuals' roundings away, not two formats' errors."""
    param = low_rank(SHAPE, (2,), base_dtype=torch.float32, factor_dtype=torch.float32)
    first = quantize(param, kind, residual=residual)
    assert_within(kept(first.base), param.base, rounding(param, first))
    second = quantize(first, "nf4", residual=residual)
    assert_within(kept(second.base), kept(first.base), rounding(first, second))


def test_a_residual_lies_where_it_is_asked_for():
    param = quantize(low_rank(SHAPE), "int8", residual="int8", residual_device="meta")
    assert {leaf.device.type for leaf in tree_leaves(param.base.residual)} == {"meta"}
    assert {leaf.device.type for leaf in tree_leaves(param.base.codes)} == {"cpu"}


@pytest.mark.parametrize("kind", ["int8", "float8", "nf4", "nvfp4", "mxfp4"])
def test_torchaos_tensor_is_of_a_dtype_that_it_knows(kind):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        held = quantize(low_rank(SHAPE, base_dtype=dtype), kind)
        wanted = torch.bfloat16 if dtype == torch.bfloat16 and kind != "nf4" else torch.float32
        assert to_torchao(held).dtype == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", NAMES)
def test_quantizing_leaves_the_old_base_as_it_is(kind, dtype):
    param = low_rank(SHAPE, (2,), base_dtype=dtype)
    with untouched(param):
        held = quantize(param, kind)
    with untouched(held):
        quantize(held, "int8")
        to_torchao(unstack({"*": held})["0"])


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_slot_of_zeros_hides_no_other(kind):
    param = low_rank(SHAPE, (), base_dtype=torch.float32, factor_dtype=torch.float32)
    for side, axis in ((param.factors.b, 1), (param.factors.a, 0)):
        side.select(axis, 0).zero_()
        held = quantize(param, kind)
        merged = merge(held)
        assert_within(exact_weight(merged), exact_weight(held), rounding(held, merged))


@pytest.mark.parametrize("kind", ["int8", "float8", "mxfp4"])
def test_folds_of_next_to_nothing_leave_a_base_without_a_residual_as_it_is(kind):
    param = quantize(low_rank(SHAPE, (), base_dtype=torch.float32, factor_dtype=torch.float32), kind, residual=None)
    tiny = param.factors._replace(b=torch.full_like(param.factors.b, 1e-30))
    bases = []
    for _ in range(20):
        param = merge(param._replace(factors=tiny))
        bases.append(dequantize(param.base, torch.float32))
    torch.testing.assert_close(bases[-1], bases[0], rtol=40 * eps(torch.float32), atol=0)


# --- compiled


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("kind", NAMES)
def test_compiled_equals_eager_without_a_recompile_over_plans(kind, residual):
    param = low_rank(SHAPE, (2,), base_dtype=torch.float32, factor_dtype=torch.float32)
    param = quantize(param, kind, residual=residual)
    compiled = torch.compile(switch, backend="aot_eager", fullgraph=True)
    assert_same(compiled(param, plan_of(4, b=3, a=2)), switch(param, plan_of(4, b=3, a=2)))
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in range(2, 5):
            plan = plan_of(4, b=3, a=2, seed=seed, frozen_for=seed)
            plan = plan._replace(b=plan.b._replace(active=plan.b.slots < seed))
            assert_same(compiled(param, plan), switch(param, plan))


class Net(nn.Module):
    """Two equal layers, which become a stack, and one of another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x)


def training(kind: str, residual: str | None, model: nn.Module | None = None) -> tuple[Any, Callable[..., Any]]:
    torch.manual_seed(0)
    net, optimizer, schedule = model or Net(), dl.optim.adamw(), dl.schedules.Schedule(interval=4, freeze=2)
    params = dl.init(net, rank=4, seed=0, targets=["*weight"], base=kind, residual=residual)

    def step(state: Any, x: Tensor, t: Tensor) -> tuple[Any, Tensor]:
        trainable, frozen, opt_state = state

        def loss_fn(trainable: Any) -> Tensor:
            return (dl.call(net, dl.combine(trainable, frozen), x) - x[:, :8]).square().mean()

        loss, grads = dl.value_and_grad(loss_fn)(trainable)
        params = dl.combine(trainable, frozen)
        plan = schedule(t, params)
        params, _ = switch(params, plan)
        opt_state = dl.project_optimizer_state(opt_state, plan)
        trainable, frozen = dl.partition(params)
        updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=1e-2)
        return (dl.apply_updates(trainable, updates), frozen, opt_state), loss

    trainable, frozen = dl.partition(params)
    return (trainable, frozen, optimizer.init(trainable)), step


def run(state: Any, step: Callable[..., Any], steps: int) -> tuple[Any, list[Tensor]]:
    losses = []
    for t in range(steps):
        state, loss = step(state, normal(0, 32, 32, dtype=torch.float32), torch.tensor(t))
        losses.append(loss.clone())
    return state, losses


# Each format with a residual, and each kind of residual, since a step takes seconds to compile.
HELD = [*((kind, "bfloat16") for kind in NAMES), ("int8", "int8"), ("int8", None)]


@pytest.mark.parametrize(("kind", "residual"), HELD)
def test_a_donated_state_keeps_its_memory_and_equals_eager(kind, residual):
    wanted = run(*training(kind, residual), 12)
    state, step = training(kind, residual)
    memory = [leaf.data_ptr() for leaf in tree_leaves(state)]
    compiled = dl.compile_step(step, backend="aot_eager")
    got = run(state, compiled, 1)
    with torch.compiler.set_stance("fail_on_recompile"):
        got = run(training(kind, residual)[0], compiled, 12)
    state, _ = run(state, compiled, 0)
    assert [leaf.data_ptr() for leaf in tree_leaves(state)] == memory
    assert_same(got, wanted)
    assert wanted[1][-1] < wanted[1][0]


@pytest.mark.inductor
@pytest.mark.parametrize("kind", ["int8", "nf4", "nvfp4", "mxfp4"])
def test_a_step_that_switches_equals_eager_with_inductor(kind):
    wanted, (state, step) = run(*training(kind, "int8"), 6), training(kind, "int8")
    compiled = dl.compile_step(step)
    memory = [leaf.data_ptr() for leaf in tree_leaves(state)]
    got, losses = run(state, compiled, 6)
    assert [leaf.data_ptr() for leaf in tree_leaves(got)] == memory
    # Other kernels round otherwise, and a code may fall the other way: by what it is worth, once.
    torch.testing.assert_close(losses, wanted[1], rtol=0.02, atol=0)


# --- what is not finite


BAD = [torch.nan, torch.inf, -torch.inf]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("kind", NAMES)
def test_what_is_not_finite_is_refused_by_name(kind, value):
    params = {"layers.*.q": low_rank(SHAPE, (2,), base_dtype=torch.float32, factor_dtype=torch.float32)}
    good, plan = quantize(params, kind), {"layers.*.q": plan_of(4, b=2, a=2)}
    message = r"weight 'layers\.\*\.q' is not finite, .*; a base in low precision stores finite values only"
    params["layers.*.q"].base[1, 3, 5] = value
    with pytest.raises(ValueError, match=message):
        quantize(params, kind)
    bad = {"layers.*.q": good["layers.*.q"]._replace(factors=tree_map(torch.clone, good["layers.*.q"].factors))}
    bad["layers.*.q"].factors.b[1, 3] = value
    for function in (lambda: merge(bad), lambda: switch(bad, plan)):
        with pytest.raises(ValueError, match=message):
            function()
    compiled = torch.compile(switch, backend="aot_eager", fullgraph=True)
    compiled(good, plan)
    with pytest.raises(ValueError, match=message):
        compiled(bad, plan)


@pytest.mark.parametrize("value", BAD)
def test_a_model_that_is_not_finite_is_refused_by_name(value):
    weight = torch.ones(8, 16)
    weight[3, 5] = value
    with pytest.raises(ValueError, match=rf"weight 'fc\.weight' is not finite, with values from .*{value}"):
        dl.init({"fc.weight": weight}, rank=2, seed=0, targets=["*"], base="int8")


# --- what is refused besides


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


@pytest.mark.parametrize(("kind", "shape"), [("nvfp4", Shape(16, 24, 2)), ("mxfp4", Shape(32, 16, 2))])
def test_rows_that_blocks_of_float4_do_not_divide_are_refused(kind, shape):
    message = rf"weight 'w' of shape \({shape.out_features}, {shape.in_features}\) does not fit {kind}, a prototype in "
    with pytest.raises(ValueError, match=message + f"torchao, .* a multiple of {BLOCKS[kind]} as `in`"):
        quantize({"w": low_rank(shape)}, kind)


def test_both_kinds_of_bases_are_refused():
    with pytest.raises(ValueError, match=r"`base` and `base_dtype` must not both be given"):
        dl.init(Net(), rank=2, seed=0, targets=["*weight"], base="int8", base_dtype=torch.bfloat16)


# --- drift


@given(quantized_params())
def test_drift_is_what_products_miss(param):
    right, seen = exact_weight(param), dl.materialize(param)
    missed = (seen.double() - right).norm() / right.norm()
    if isinstance(param.base, Tensor) or not tree_leaves(param.base.residual):
        assert drift(param).isnan()
    else:
        # Two sums and the norm of what is computed in the factors' dtype, float32 at least.
        torch.testing.assert_close(drift(param).double(), missed, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(drift(param, right).double(), missed, rtol=1e-3, atol=1e-6)


def test_drift_is_reported_by_name():
    params = dl.init(Net(), rank=4, seed=0, targets=["*weight"], base="int8")
    found = drift(params)
    assert found.keys() == {"layers.*.weight", "head.weight"}
    assert all(0 < value < 0.02 for value in found.values())
    dense = dl.materialize({**dl.init(Net(), rank=4, seed=0, targets=["*weight"])})
    assert drift(params, dense).keys() == found.keys()


def test_a_residual_keeps_drift_from_growing():
    """Two thousand folds: with a residual the error of one, without it many times that."""
    weight = low_rank(Shape(64, 64, 16), base_dtype=torch.float64, factor_dtype=torch.float32)
    held = {residual: quantize(weight, "int8", residual=residual) for residual in RESIDUALS}
    for seed in range(2000):
        plan = plan_of(16, b=1, a=1, seed=seed)
        weight = switch(weight, plan).param
        held = {residual: switch(param, plan).param for residual, param in held.items()}
    exact_weight = dl.materialize(weight)
    off = {residual: drift(param, exact_weight) for residual, param in held.items()}
    once = drift(quantize(weight, "int8", residual=None), exact_weight)
    assert off["bfloat16"] < 1.02 * once
    assert off["int8"] < 1.2 * once
    assert off[None] > 10 * once
