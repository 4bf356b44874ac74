"""Decay multiplies weights, however they are stored and however often they are switched."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves, tree_map

import dynlora_fn as dl
from dynlora_fn.optim import decay
from dynlora_fn.testing import (
    STORAGES,
    Shape,
    Storage,
    assert_same,
    assert_within,
    check_compiles,
    check_vmap,
    eps,
    exact_weight,
    low_rank,
    low_rank_params,
    normal,
    rounding,
    trees,
    untouched,
)
from dynlora_fn.testing._shadow import magnitude
from tests.support.versions import skip_without_views_of_dtypes

RATES = st.sampled_from([0.0, 1e-3, 0.25, 1.0])
FITTING = Shape(16, 64, 4)  # of a size that all blocks divide


def kinds(tree) -> list:
    return [(leaf.shape, leaf.dtype) for leaf in tree_leaves(tree)]


@given(low_rank_params(), RATES)
def test_the_weight_is_multiplied(param, rate):
    with untouched(param):
        new = decay(param, rate)
    assert kinds(new) == kinds(param)
    assert_same((new.factors.a, new.seed), (param.factors.a, param.seed))
    bound = rounding(param, new) + eps(param.factors.b.dtype) * magnitude(param)
    assert_within(exact_weight(new), (1 - rate) * exact_weight(param), bound)


@given(trees(), RATES)
def test_full_rank_tensors_decay_too(params, rate):
    new = decay(params, rate)
    assert list(new) == list(params)
    for name, param in params.items():
        assert_same(new[name], decay(param, rate))
        if isinstance(param, torch.Tensor):
            assert_within(new[name], (1 - rate) * param.double(), eps(param.dtype) * param.double().abs())


@pytest.mark.parametrize("storage", [storage for storage in STORAGES if storage.kind in ("int8", "float8", "nvfp4")])
def test_no_code_is_rounded_again(storage: Storage):
    param = low_rank(FITTING, (2,), storage=storage)
    assert_same(decay(param, 0.1).base.codes.codes, param.base.codes.codes)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_it_compiles_and_maps(storage: Storage):
    param = low_rank(FITTING, (2,), storage=storage)
    check_compiles(lambda param: decay(param, 0.1), arguments=(param,))
    skip_without_views_of_dtypes(storage)
    check_vmap(lambda param: decay(param, 0.1), arguments=(param,))


def test_a_new_rate_does_not_compile_again():
    params = {"w": low_rank(FITTING), "bias": normal(0, 5)}
    compiled = torch.compile(decay, fullgraph=True, backend="aot_eager")
    compiled(params, torch.tensor(0.1))
    with torch.compiler.set_stance("fail_on_recompile"):
        for rate in (0.2, 0.3):
            rate = torch.tensor(rate)  # noqa: PLW2901
            assert_same(compiled(params, rate), decay(params, rate))


def test_members_of_an_ensemble_have_their_rates():
    stack, rates = low_rank(FITTING, (3,)), torch.tensor([0.0, 0.1, 0.5])
    got = torch.vmap(decay)(stack, rates)
    for index, rate in enumerate(rates):
        member = tree_map(lambda leaf: leaf[index], stack)  # noqa: B023
        assert_same(tree_map(lambda leaf: leaf[index], got), decay(member, rate))  # noqa: B023


def test_a_rate_by_name_is_of_these_names():
    params = {"layers.*.w": low_rank(FITTING, (2,)), "layers.*.deep.w": low_rank(FITTING, (2,)), "bias": normal(0, 5)}
    new = decay(params, {"layers.*.w": 0.5, "bias": torch.tensor(0.25)})
    assert new["layers.*.deep.w"] is params["layers.*.deep.w"], "the star of a stack is no glob"
    assert_same(new["layers.*.w"], decay(params["layers.*.w"], 0.5))
    assert_same(new["bias"], 0.75 * params["bias"])


def test_a_float32_rate_is_subtracted_in_the_precision_of_the_weight():
    rate = torch.tensor(1e-3)
    assert decay(torch.ones(1, dtype=torch.float64), rate).item() == 1 - rate.double().item()


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (1.5, "`rate` is 1.5 for 'w'; use a number from 0 to 1"),
        (-0.1, "`rate` is -0.1 for 'w'"),
        (float("nan"), "`rate` is nan for 'w'"),
        (torch.ones(2), r"`rate` has shape \(2,\) for 'w'; use a number or a 0-d tensor"),
        ({"v": 0.1}, "`rate` contains 'v', which is not one of the names 'w'; remove it"),
    ],
)
def test_bad_rates_are_refused(rate, message):
    with pytest.raises(ValueError, match=message):
        decay({"w": low_rank(Shape(6, 4, 2))}, rate)


def test_counters_are_not_decayed():
    params = {"w": low_rank(Shape(6, 4, 2)), "steps": torch.tensor(7)}
    with pytest.raises(ValueError, match=r"`params` has a tensor of dtype torch\.int64 for 'steps'"):
        decay(params, 0.1)
    assert decay(params, {"w": 0.1})["steps"] == 7


def test_rates_by_name_need_names():
    with pytest.raises(ValueError, match=r"`rate` is a dict of \['w'\], but `params` is one parameter"):
        decay(low_rank(Shape(6, 4, 2)), {"w": 0.1})


def test_a_dense_weight_decays_as_in_torch():
    """The decay comes before the update, and the update does not depend on it."""
    weight, lr, weight_decay = normal(0, 6, 4), 1e-2, 0.3
    theirs, optimizer = torch.nn.Parameter(weight.clone()), dl.optim.adamw()
    adamw = torch.optim.AdamW([theirs], lr=lr, weight_decay=weight_decay)
    trainable = {"w": weight}
    opt_state = optimizer.init(trainable)
    for step in range(20):
        grads = {"w": normal(step, 6, 4)}
        trainable = decay(trainable, lr * weight_decay)
        updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=lr)
        trainable = dl.apply_updates(trainable, updates)
        theirs.grad = grads["w"]
        adamw.step()
    torch.testing.assert_close(trainable["w"], theirs.detach(), rtol=1e-12, atol=1e-12)


BASES = [None, Storage("int8", "int8"), Storage("int8", "bfloat16"), Storage("nf4", "bfloat16")]


@pytest.mark.parametrize("storage", BASES, ids=str)
@pytest.mark.parametrize("is_deferred", [False, True])
def test_a_weight_whose_vectors_are_switched_shrinks_as_a_dense_one(storage, is_deferred):
    """Decayed vectors leave and fresh ones enter. A decay of factors would make the weight grow."""
    param = low_rank(FITTING, storage=storage, factor_dtype=torch.float32)
    start = exact_weight(param)
    params = {"w": dl.bases.defer(param, vectors=8) if is_deferred else param}
    schedule = dl.schedules.Schedule(interval=4, freeze=1)
    for step in range(200):
        params = decay(params, 5e-3)
        params, _ = dl.switch(params, schedule(step, params))
    error = (exact_weight(params["w"]) - (1 - 5e-3) ** 200 * start).norm() / start.norm()
    assert error < (1e-5 if storage is None else 0.02)
