"""Moments in 8 bit: torchao's own bits, exact resets, and otherwise the same AdamW."""

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dynlora_fn import Factors, Plan, SidePlan, apply_updates, compile_step, partition, project_optimizer_state
from dynlora_fn.optim import Change, MomentumState, SignedMoment, UnsignedMoment, adamw, muon
from dynlora_fn.optim._eight_bit import decode_moments, empty_moments, encode_moments
from dynlora_fn.testing import Shape, assert_same, low_rank, normal, plans, seeds, untouched

torchao = pytest.importorskip("torchao.optim.subclass_8bit")
PARAM = low_rank(Shape(64, 128, 64), (2,), base_dtype=torch.float32, factor_dtype=torch.float32)
TRAINABLE = partition({"w": PARAM, "head": normal(0, 64, 64, dtype=torch.float32), "bias": normal(1, 64)}).trainable


def some_grads(seed: int) -> dict:
    return tree_map(lambda leaf: normal(seed, *leaf.shape).to(leaf.dtype), TRAINABLE)


def some_state(steps: int = 3):
    """Return a state after a few updates, so that no moment is zero."""
    optimizer, trainable = adamw(moments="8bit"), TRAINABLE
    state = optimizer.init(trainable)
    for step in range(steps):
        updates, state = optimizer.update(some_grads(step), state, trainable, lr=0.01)
        trainable = apply_updates(trainable, updates)
    return optimizer, trainable, state


@given(seeds, st.sampled_from([SignedMoment, UnsignedMoment]), st.sampled_from([1e-12, 1e-3, 1.0, 1e6]))
def test_codes_are_torchaos(seed, kind, scale):
    values = scale * normal(seed, 32, 256, dtype=torch.float32)
    values = values if kind is SignedMoment else values.square()
    values[seed % 32] = 0
    wanted = torchao.OptimState8bit.zeros(values.shape, signed=kind is SignedMoment)
    wanted.copy_(values)
    got = encode_moments(values, empty_moments(values, kind), "w")
    assert_same(got, kind(wanted.codes, wanted.scale))
    assert_same(decode_moments(got), wanted.dequantize())


def test_what_is_small_or_of_no_whole_blocks_stays_as_it_is():
    state = adamw(moments="8bit").init(TRAINABLE)
    assert isinstance(state.inner.mu["w"], Factors)
    assert [type(leaf) for leaf in (*state.inner.mu["w"], state.inner.mu["head"])] == [SignedMoment] * 3
    assert [type(leaf) for leaf in (*state.inner.nu["w"], state.inner.nu["head"])] == [UnsignedMoment] * 3
    assert state.inner.mu["bias"].dtype == torch.float64
    odd = adamw(moments="8bit").init({"w": torch.ones(101, 101)})
    assert odd.inner.mu["w"].dtype == torch.float32
    small = adamw(moments="8bit").init({"w": torch.ones(16, 32)})
    assert small.inner.mu["w"].dtype == torch.float32
    assert not any(leaf.any() for leaf in tree_leaves(decode_moments((state.inner.mu, state.inner.nu))))


def test_an_update_is_that_of_the_decoded_moments():
    optimizer, trainable, state = some_state()
    inner = state.inner._replace(mu=decode_moments(state.inner.mu), nu=decode_moments(state.inner.nu))
    dense = state._replace(inner=inner)
    with untouched(state):
        got = optimizer.update(some_grads(9), state, trainable, lr=0.01)
    wanted = adamw().update(some_grads(9), dense, trainable, lr=0.01)
    assert_same(got.updates, wanted.updates)
    for field in ("mu", "nu"):
        moments, like = (getattr(tree, field) for tree in (wanted.opt_state.inner, state.inner))
        encoded = {name: encode_moments(leaf, like[name], name) for name, leaf in moments.items()}
        assert_same(getattr(got.opt_state.inner, field), encoded)
    assert_same(got.opt_state.inner.count, wanted.opt_state.inner.count)
    assert_same(got.opt_state.frozen_for, wanted.opt_state.frozen_for)


STATE = some_state()[2]


@given(plans(PARAM))
def test_a_reset_is_exact(plan):
    """The counterparts become zero, and every other code and scale stays."""
    got = project_optimizer_state(STATE, {"w": plan})
    for tree, old in ((got.inner.mu, STATE.inner.mu), (got.inner.nu, STATE.inner.nu)):
        decoded = {"mu": {"w": decode_moments(old["w"])}}
        wanted = project_optimizer_state(decoded, {"w": plan}, roles={"mu": "first_moment"})["mu"]["w"]
        assert_same(decode_moments(tree["w"]), wanted)
        for side, before, dense in zip(tree["w"], old["w"], wanted, strict=True):
            assert_same(side.scale, before.scale)
            assert torch.equal(side.codes[dense != 0], before.codes[dense != 0])
        assert_same(tree["head"], old["head"])


@pytest.mark.slow
def test_compiled_equals_eager_in_the_old_memory():
    optimizer, trainable, _ = some_state()

    def step(state, grads):
        trainable, opt_state = state
        updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=0.01)
        return (apply_updates(trainable, updates), opt_state), None

    state = wanted = tree_map(torch.clone, (trainable, optimizer.init(trainable)))
    memory = [leaf.data_ptr() for leaf in tree_leaves(state)]
    compiled = compile_step(step, backend="aot_eager")
    wanted = tree_map(torch.clone, wanted)
    for seed in range(3):
        wanted, _ = step(wanted, some_grads(seed))
        state, _ = compiled(state, some_grads(seed))
    assert_same(state, wanted)
    assert [leaf.data_ptr() for leaf in tree_leaves(state)] == memory


def test_moments_take_a_quarter():
    def size(tree) -> int:
        return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))

    large = {"w": torch.ones(512, 512)}
    plain, small = adamw().init(large), adamw(moments="8bit").init(large)
    assert size(small.inner.mu) == size(plain.inner.mu) / 4 + 4 * 512 * 512 / 256


@pytest.mark.parametrize("moments", ["8bit", "bfloat16"])
def test_muon_with_a_small_moment_moves_by_the_moment_before_it_is_rounded(moments: Literal["8bit", "bfloat16"]):
    trainable = {"w": TRAINABLE["w"], "head": TRAINABLE["head"]}
    small, state = muon(moments=moments), muon(moments=moments).init(trainable)
    for step in range(2):
        dense = state._replace(inner=MomentumState(tree_map(torch.Tensor.float, decode_moments(state.inner.mu))))
        grads = {name: some_grads(step)[name] for name in trainable}
        with untouched(state):
            got = small.update(grads, state, trainable, lr=0.01)
        wanted = muon().update(grads, dense, trainable, lr=0.01)
        assert_same(got.updates, wanted.updates)
        assert_same(tree_map(torch.Tensor.numel, got.opt_state), tree_map(torch.Tensor.numel, state))
        state = got.opt_state
    mu, exact = decode_moments(state.inner.mu), wanted.opt_state.inner.mu
    relative = 2**-8 if moments == "bfloat16" else 0.06  # torchao's codes have steps of up to 1 / 9
    for side, like in zip(tree_leaves(mu), tree_leaves(exact), strict=True):
        assert (side.float() - like).norm() <= relative * like.norm()
    assert (type(state.inner.mu["head"]) is SignedMoment) == (moments == "8bit")


@given(plans(PARAM))
def test_a_small_moment_of_muon_is_reset_exactly(plan):
    for moments in ("8bit", "bfloat16"):
        optimizer, trainable = muon(moments=moments), {"w": TRAINABLE["w"]}
        state = optimizer.update({"w": some_grads(0)["w"]}, optimizer.init(trainable), trainable, lr=0.01).opt_state
        got = project_optimizer_state(state, {"w": plan})
        dense = state._replace(inner=MomentumState(decode_moments(state.inner.mu)))
        wanted = project_optimizer_state(dense, {"w": plan})
        assert_same(decode_moments(got.inner.mu), wanted.inner.mu)


@pytest.mark.parametrize("optimizer", [adamw(moments="8bit"), muon(moments="8bit")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_update_keeps_the_dtypes_of_the_state(optimizer, dtype):
    trainable = {"w": torch.ones(64, 64, dtype=dtype)}
    state = optimizer.init(trainable)
    new = optimizer.update(trainable, state, trainable, lr=0.1).opt_state
    assert [leaf.dtype for leaf in tree_leaves(new)] == [leaf.dtype for leaf in tree_leaves(state)]


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="`moments` must be 'float32' or '8bit', got 'int8'"):
        adamw(moments="int8")
    with pytest.raises(ValueError, match="`moments` must be 'float32', 'bfloat16' or '8bit', got 'int8'"):
        muon(moments="int8")


def test_a_moment_in_8_bit_is_pruned_exactly_and_not_transported():
    _, trainable, state = some_state()
    side = SidePlan(torch.tensor([0, 5]), torch.tensor([0, 0]), torch.tensor([True, True]))
    plan = {"w": Plan(side, side, torch.tensor(2))}
    pruned = project_optimizer_state(state, plan, rule="prune", prune=0.9)
    old, new = (decode_moments(opt_state.inner.mu["w"]).b for opt_state in (state, pruned))
    mask = torch.zeros(64, dtype=torch.bool).index_fill(0, side.slots, True)
    assert_same(pruned.inner.mu["w"].b.codes[..., ~mask], state.inner.mu["w"].b.codes[..., ~mask])
    assert_same(new[..., mask][new[..., mask] != 0], old[..., mask][new[..., mask] != 0])
    assert (new[..., mask] == 0).float().mean() > 0.8  # of both moments' smallest 90 %
    params = {"w": PARAM._replace(factors=trainable["w"])}
    with pytest.raises(ValueError, match="`rule` must not be 'transport' for 8-bit moments, got them for 'w'"):
        project_optimizer_state(state, plan, rule="transport", change=Change(params, params))


def test_scales_are_float32_whatever_the_default_dtype():
    optimizer, trainable = adamw(moments="8bit"), {"w": normal(0, 64, 64, dtype=torch.float32)}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        state = optimizer.init(trainable)
        _, new = optimizer.update(trainable, state, trainable, lr=0.1)
    finally:
        torch.set_default_dtype(before)
    assert_same(state, optimizer.init(trainable))
    assert [leaf.dtype for leaf in tree_leaves(new)] == [leaf.dtype for leaf in tree_leaves(state)]
