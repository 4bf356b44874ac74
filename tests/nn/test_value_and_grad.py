"""Values and gradients by either route equal those of autograd."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from dynlora_fn import value_and_grad
from dynlora_fn.testing import assert_same, eps, normal

EPS = eps(torch.float64)


def some_loss(tree: dict[str, Any], x: Tensor, *, scale: float = 1.0) -> Tensor:
    return scale * (x @ tree["w"][0]).tanh().mul(tree["b"]).sum()


def some_tree() -> dict[str, Any]:
    return {"w": (normal(0, 3, 4),), "b": normal(1, 4), "unused": normal(2, 2)}


@pytest.mark.parametrize("via", ["func", "autograd"])
def test_both_routes_equal_autograd(via):
    tree, x = some_tree(), normal(3, 5, 3)
    value, grads = value_and_grad(some_loss, via=via)(tree, x, scale=3.0)
    leaves = [leaf.clone().requires_grad_() for leaf in tree_leaves(tree)]
    loss = some_loss({"w": (leaves[0],), "b": leaves[1]}, x, scale=3.0)
    wanted = [*torch.autograd.grad(loss, leaves[:2]), torch.zeros(2, dtype=torch.float64)]
    # The same kernels in the same order.
    assert_same(value, loss.detach())
    assert_same(grads, {"w": (wanted[0],), "b": wanted[1], "unused": wanted[2]})
    assert not value.requires_grad
    assert not any(leaf.requires_grad for leaf in tree_leaves((grads, tree)))


@pytest.mark.parametrize("via", ["func", "autograd"])
def test_a_loss_may_report_more(via):
    def loss_fn(tree, x):
        loss = some_loss(tree, x)
        return loss, {"twice": 2 * loss}

    tree, x = some_tree(), normal(3, 5, 3)
    (loss, aux), grads = value_and_grad(loss_fn, via=via, has_aux=True)(tree, x)
    plain = value_and_grad(some_loss)(tree, x)
    assert_same((loss, grads), tuple(plain))
    assert_same(aux["twice"], 2 * loss)
    assert not aux["twice"].requires_grad


def test_gradients_do_not_depend_on_the_mode_of_the_caller():
    tree, x = some_tree(), normal(3, 5, 3)
    with torch.no_grad():
        got = [value_and_grad(some_loss, via=via)(tree, x) for via in ("func", "autograd")]
    assert_same(got, [value_and_grad(some_loss)(tree, x)] * 2)


def test_checkpoints_recompute_through_autograd():
    calls = []

    def layer(w, x):
        calls.append(1)
        return (x @ w).tanh()

    def loss_fn(tree, x, is_checkpointed):
        w = tree["w"][0]
        hidden = checkpoint(layer, w, x, use_reentrant=False) if is_checkpointed else layer(w, x)
        return hidden.mul(tree["b"]).sum()

    tree, x = some_tree(), normal(3, 5, 3)
    saved, recomputed = (value_and_grad(loss_fn, via="autograd")(tree, x, flag) for flag in (False, True))
    assert_same(recomputed, saved)
    assert len(calls) == 1 + 2


def test_per_sample_gradients_are_the_loop():
    tree, x = some_tree(), normal(3, 5, 3)
    got = torch.vmap(value_and_grad(some_loss), in_dims=(None, 0))(tree, x)
    alone = [value_and_grad(some_loss)(tree, row) for row in x]
    # Sums of 3 and 4 products of magnitude about 1, in another order.
    torch.testing.assert_close(got, tree_map(lambda *leaves: torch.stack(leaves), *alone), rtol=0, atol=32 * EPS)


def test_an_unknown_route_is_refused():
    with pytest.raises(ValueError, match="`via` must be 'func' or 'autograd', got 'jax'"):
        value_and_grad(some_loss, via="jax")
