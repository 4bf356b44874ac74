"""Another rank in the middle of a run: the weight, the vectors that stay, and the optimizer state."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

import dynlora_fn as dl
from dynlora_fn.interop import _resize, resize
from dynlora_fn.switching._weight import first_vectors
from dynlora_fn.testing import (
    Shape,
    assert_same,
    assert_within,
    check_preserves_weight,
    check_pure,
    exact_weight,
    low_rank,
    low_rank_params,
    normal,
    rounding,
)

SHAPE = Shape(6, 8, 4)


def to_rank(rank_of):
    """Return a transform of one weight."""

    def transform(param: dl.LowRank) -> dl.LowRank:
        return resize({"w": param}, rank=rank_of(param)).params["w"]

    return transform


RANKS = {"least": lambda param: 1, "most": lambda param: min(param.shape[-2:])}


@pytest.mark.parametrize("rank_of", RANKS.values(), ids=RANKS)
def test_the_weight_is_kept(rank_of):
    check_preserves_weight(to_rank(rank_of), exact_factors=True)
    check_pure(to_rank(rank_of))


@given(low_rank_params(deferred=False), st.integers(1, 8), st.sampled_from(["switchlora", "lora"]))
def test_slots_keep_their_vectors_and_new_ones_get_those_of_init(param, rank, start):
    rank, old = min(rank, *param.shape[-2:]), param.factors.b.shape[-1]
    new = resize({"w": param}, rank=rank, start=start).params["w"]
    assert_same(new.factors.b[..., :old], param.factors.b[..., :rank])
    assert_same(new.factors.a[..., :old, :], param.factors.a[..., :rank, :])
    first = first_vectors(new.seed, param.shape[-2:], rank, start, param.factors.b.dtype)
    assert_same(new.factors.b[..., old:], first.b[..., old:])
    assert_same(new.factors.a[..., old:, :], first.a[..., old:, :])
    assert (rank == old) == torch.equal(new.seed, param.seed)


def test_the_vectors_of_init_are_those_of_its_seed():
    param = dl.init({"w": torch.ones(6, 8)}, rank=5, seed=3, targets=["w"])["w"]
    assert_same(first_vectors(param.seed, (6, 8), 5, "switchlora", torch.float32), param.factors)


def test_there_and_back_is_another_basis():
    params = {"w": low_rank(SHAPE)}
    again = resize(resize(params, rank=2).params, rank=4).params
    assert not torch.equal(again["w"].seed, params["w"].seed)
    assert_within(exact_weight(again["w"]), exact_weight(params["w"]), rounding(params["w"], again["w"], folds=2))


@pytest.mark.parametrize("rank", [2, 6])
@pytest.mark.parametrize("base", [None, "int8"])
def test_a_checkpoint_after_a_resize_belongs_to_a_weight_that_is_deferred_at_the_new_rank(rank, base):
    """The divisor of pending folds is in no checkpoint, so it must follow from the rank."""
    init = partial(dl.init, seed=0, targets=["w"], base=base)
    params = dl.bases.defer(init({"w": normal(0, 8, 8, dtype=torch.float32)}, rank=4), vectors=16)
    params = dl.switch(params, dl.schedules.every(1)(0, params)).params
    new = resize(params, rank=rank).params
    assert_within(exact_weight(new["w"]), exact_weight(params["w"]), rounding(params["w"], new["w"], folds=2))
    assert not new["w"].base.pending.b.any()
    new = dl.switch(new, dl.schedules.every(1)(0, new)).params
    assert new["w"].base.pending.b.any()
    fresh = dl.bases.defer(init({"w": torch.zeros(8, 8)}, rank=rank), vectors=16)
    resumed = tree_unflatten(tree_leaves(new), tree_flatten(fresh)[1])
    assert_same(dl.materialize(resumed), dl.materialize(new))


def test_no_vector_enters_a_second_time():
    """The schedule counts from the rank. Vectors in use before a resize must not enter another slot after it."""
    schedule, params = dl.schedules.Schedule(interval=4, freeze=1), {"w": low_rank(Shape(12, 12, 2))}
    entered: list[bytes] = []
    for step in range(40):
        if step in (10, 20, 30):
            params = resize(params, rank={10: 6, 20: 3, 30: 6}[step]).params
        plan = schedule(step, params)["w"]
        vectors = dl.candidates(params["w"], plan).a[plan.a.active]
        entered += [vector.numpy().tobytes() for vector in vectors]
        params = {"w": dl.switch(params["w"], plan).param}
    assert len(entered) > 20
    assert len(set(entered)) == len(entered)


def test_a_compiled_step_compiles_again_for_the_new_shapes():
    net = nn.Linear(8, 6, bias=False).double()
    params = dl.init(net, rank=2, seed=0, targets=["weight"], dtype=torch.float64)
    schedule, optimizer, x = dl.schedules.Schedule(interval=4, freeze=1), dl.optim.adamw(), normal(0, 5, 8)

    def step(state, x):
        trainable, frozen, opt_state, t = state
        loss, grads = dl.value_and_grad(lambda tree: dl.call(net, dl.combine(tree, frozen), x).square().mean())(
            trainable
        )
        params = dl.combine(trainable, frozen)
        plan = schedule(t, params)
        params, _ = dl.switch(params, plan)
        opt_state = dl.project_optimizer_state(opt_state, plan)
        trainable, frozen = dl.partition(params)
        updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=1e-2)
        return (dl.apply_updates(trainable, updates), frozen, opt_state, t + 1), loss

    trainable, frozen = dl.partition(params)
    states = [(trainable, frozen, optimizer.init(trainable), torch.tensor(0)) for _ in range(2)]
    states = [tree_map(torch.clone, state) for state in states]
    compiled, losses = dl.compile_step(step, backend="aot_eager"), []
    for t in range(8):
        if t == 4:
            for index, (trainable, frozen, opt_state, count) in enumerate(states):
                params, opt_state = resize(dl.combine(trainable, frozen), opt_state, rank=5)  # noqa: PLW2901
                states[index] = tree_map(torch.clone, (*dl.partition(params), opt_state, count))
        (states[0], loss), (states[1], compiled_loss) = step(states[0], x), compiled(states[1], x)
        torch.testing.assert_close(compiled_loss, loss)
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    torch.testing.assert_close(states[1][0], states[0][0])


@pytest.mark.parametrize("entries", [1, 2**20])
@pytest.mark.parametrize("start", ["switchlora", "lora"])
def test_weights_are_resized_together_as_alone(start, entries, monkeypatch):
    monkeypatch.setattr(_resize, "_BATCH", entries)
    shapes = {"w": (6, 8), "v": (9, 5), "layers.0.u": (4, 7), "layers.1.u": (4, 7), "same": (5, 5), "bias": (6,)}
    weights = {name: normal(0, *shape) for name, shape in shapes.items()}
    params = dl.init(weights, rank={"w": 4, "*": 3}, seed=0, targets=["w", "v", "layers.*", "same"])
    opt_state, ranks = (
        dl.optim.adamw().init(dl.partition(params).trainable),
        {"w": 2, "v": 5, "layers.*.u": 4, "same": 3},
    )
    together, one_by_one = resize(params, opt_state, rank=ranks, start=start), (params, opt_state)
    for name, rank in ranks.items():
        one_by_one = resize(*one_by_one, rank={name: rank}, start=start)
    assert_same(together, one_by_one)
    storages = [leaf.untyped_storage().data_ptr() for leaf in tree_leaves(together)]
    assert len(set(storages)) == len(storages)


def test_ranks_by_name():
    params = {"w": low_rank(SHAPE), "v": low_rank(SHAPE), "bias": normal(0, 6)}
    new = resize(params, rank={"w": 2}).params
    assert list(new) == list(params)
    assert new["v"] is params["v"]
    assert new["bias"] is params["bias"]
    assert new["w"].factors.b.shape == (6, 2)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, r"`rank` is 0 for 'w' of shape \(6, 8\); use at least 1 and at most min\(out, in\) = 6"),
        (7, r"`rank` is 7 for 'w' of shape \(6, 8\)"),
        ({"bias": 2}, "`rank` contains 'bias', which is not one of the names 'w'; remove it"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(rank, message):
    with pytest.raises(ValueError, match=message):
        resize({"w": low_rank(SHAPE), "bias": normal(0, 6)}, rank=rank)


def test_a_single_weight_is_refused():
    with pytest.raises(ValueError, match="`params` must be by parameter name, got a single LowRank"):
        resize(low_rank(SHAPE), rank=2)


def test_a_dithered_schedule_is_of_its_ranks():
    params = {"w": low_rank(SHAPE)}
    schedule = dl.schedules.dithered(dl.schedules.Schedule(interval=10), params, total_steps=10, seed=0)
    with pytest.raises(ValueError, match="'w' has rank 2, but the schedule was dithered at rank 4; call `dithered`"):
        schedule(0, resize(params, rank=2).params)
