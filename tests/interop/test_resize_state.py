"""`resize` brings an optimizer's state to the new rank."""

from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import dynlora_fn as dl
from dynlora_fn.interop import resize
from dynlora_fn.optim._eight_bit import decode_moments
from dynlora_fn.testing import (
    Shape,
    assert_same,
    low_rank,
    normal,
    optimizer_state,
)
from tests.support.optimizer_table import OPTIMIZERS

SHAPE = Shape(6, 8, 4)


def moments(state) -> tuple:
    """Return the first and the second moments of AdamW, in full precision."""
    return tuple(decode_moments(tree)["w"] for tree in (state.inner.mu, state.inner.nu))


@pytest.mark.parametrize("rank", [2, 6])
@pytest.mark.parametrize("kind", ["float32", "8bit"])
def test_the_state_of_vectors_that_stay_is_that_of_gradients_at_the_new_rank(rank, kind):
    """The same dense gradients at the new rank give these moments, because the vectors are the same."""
    shape = Shape(64, 128, 4) if kind == "8bit" else SHAPE
    params, optimizer = (
        {"w": low_rank(shape, (2,) if kind == "8bit" else (3,)), "bias": normal(0, 5)},
        dl.optim.adamw(moments=kind),
    )
    before = optimizer_state(params, steps=3, optimizer=optimizer)
    new, after = resize(params, before, rank=rank)
    assert_same(tree_map(lambda leaf: leaf.shape, optimizer.init(dl.partition(new).trainable).frozen_for),
                tree_map(lambda leaf: leaf.shape, after.frozen_for))  # fmt: skip
    stays = min(rank, 4)
    for exponent, old_moment, moment in zip((1, 2), moments(before), moments(after), strict=True):
        scale, tolerance = (4 / rank) ** exponent, 0.02 if kind == "8bit" else 1e-12
        wanted = scale * old_moment.b[..., :stays]
        torch.testing.assert_close(
            moment.b[..., :stays], wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max())
        )
        wanted = scale * old_moment.a[..., :stays, :]
        torch.testing.assert_close(
            moment.a[..., :stays, :], wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max())
        )
        assert not moment.b[..., stays:].any()
        assert not moment.a[..., stays:, :].any()
    for old_count, count in (
        (before.inner.count["w"], after.inner.count["w"]),
        (before.frozen_for["w"], after.frozen_for["w"]),
    ):
        assert_same(count.b[..., :stays], old_count.b[..., :stays])
        assert_same(count.a[..., :stays, :], old_count.a[..., :stays, :])
        assert not count.b[..., stays:].any()
        assert not count.a[..., stays:, :].any()
    assert_same(after.inner.mu["bias"], before.inner.mu["bias"])


@pytest.mark.parametrize("entry", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("rank", [1, 6])
def test_every_optimizer_goes_on(entry, rank):
    params = {"w": low_rank(SHAPE, (3,)), "other": low_rank(SHAPE), "bias": normal(0, 5)}
    params, state = resize(params, optimizer_state(params, steps=2, optimizer=entry.transform), rank={"w": rank})
    trainable = dl.partition(params).trainable
    fresh = entry.transform.init(trainable)
    kinds = [tree_map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (state, fresh)]
    assert kinds[0] == kinds[1]
    updates, _ = entry.transform.update(trainable, state, trainable, lr=0.1)
    assert all(leaf.isfinite().all() for leaf in tree_leaves(updates))


def test_resizing_to_the_same_rank_changes_nothing():
    params = {"w": low_rank(SHAPE)}
    state = optimizer_state(params, steps=2)
    assert_same(tuple(resize(params, state, rank=4)), (params, state))


@pytest.mark.parametrize(
    ("state", "roles", "message"),
    [
        (
            lambda factors: {"velocity": {"w": factors}},
            None,
            r"factors at \['velocity'\]\['w'\], whose role is not declared",
        ),
        (lambda factors: {"x": {"w": factors}}, {"x": "unchanged"}, r"at \['x'\] with the role 'unchanged'"),
        (
            lambda factors: {"x": {"v": factors}},
            {"x": "first_moment"},
            r"of every resized weight, got none for \['w'\]",
        ),
        (
            lambda factors: {"state": {}, "param_groups": []},
            None,
            "a state of torch.optim at its root, which cannot be",
        ),
        (
            lambda factors: {"x": {"w": low_rank(Shape(6, 8, 3)).factors}},
            {"x": "first_moment"},
            r"of the ranks \(3, 3\), but the weight has rank 4",
        ),
    ],
)
def test_states_without_roles_are_refused(state, roles, message):
    param = low_rank(SHAPE)
    with pytest.raises(ValueError, match=message):
        resize({"w": param}, state(param.factors), rank=2, roles=roles)


def test_a_state_of_torchopt_is_refused():
    class ScaleByRmsState(NamedTuple):
        nu: Any

    ScaleByRmsState.__module__ = "torchopt.transform.scale_by_rms"
    param = low_rank(SHAPE)
    message = r"a state of torchopt at \[0\], which cannot be resized; initialize the optimizer again"
    with pytest.raises(ValueError, match=message):
        resize({"w": param}, (ScaleByRmsState({"w": param.factors}),), rank=2)


def test_a_state_with_roles_of_its_own_is_resized():
    param = low_rank(SHAPE)
    new = resize({"w": param}, {"velocity": {"w": param.factors}}, rank=2, roles={"velocity": "first_moment"})
    assert_same(new.opt_state["velocity"]["w"].b, 2 * param.factors.b[:, :2])
