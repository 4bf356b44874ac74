"""Values and gradients by either route equal those of autograd."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
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


# --- inside each other, and inside other transforms


def after_a_step(via: str, tree: dict[str, Any], x: Tensor) -> Tensor:
    grads = value_and_grad(some_loss, via=via)(tree, x).grads
    return some_loss(tree_map(lambda leaf, gradient: leaf - 0.1 * gradient, tree, grads), x)


@pytest.mark.parametrize("outer", ["func", "autograd"])
@pytest.mark.parametrize("inner", ["func", "autograd"])
def test_gradients_of_gradients_are_those_of_func(inner, outer):
    tree, x = some_tree(), normal(3, 5, 3)
    wanted = torch.func.grad(partial(after_a_step, "func"))(tree, x)
    if (inner, outer) == ("autograd", "func"):
        with pytest.raises(
            ValueError, match=r"`via` is 'autograd' inside a transform of `torch\.func`.*; use via='func'"
        ):
            value_and_grad(partial(after_a_step, inner), via=outer)(tree, x)
        return
    got = value_and_grad(partial(after_a_step, inner), via=outer)(tree, x)
    torch.testing.assert_close(got.grads, wanted, rtol=0, atol=1e3 * EPS)
    assert not any(leaf.requires_grad for leaf in tree_leaves(got))


def test_third_derivatives():
    def twice(via: str, tree: dict[str, Any], x: Tensor) -> Tensor:
        return tree_sum(value_and_grad(partial(after_a_step, via), via=via)(tree, x).grads)

    def tree_sum(tree: Any) -> Tensor:
        return sum((leaf.sin().sum() for leaf in tree_leaves(tree)), torch.zeros((), dtype=torch.float64))

    tree, x = some_tree(), normal(3, 5, 3)
    got, wanted = (value_and_grad(partial(twice, via), via=via)(tree, x) for via in ("autograd", "func"))
    torch.testing.assert_close(tuple(got), tuple(wanted), rtol=0, atol=1e4 * EPS)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, tree: torch.func.grad(f)(tree),
        lambda f, tree: torch.func.jvp(f, (tree,), (tree,)),
        torch.func.vjp,
        lambda f, tree: torch.vmap(f)(tree_map(lambda leaf: torch.stack([leaf, leaf]), tree)),
        lambda f, tree: torch.func.hessian(f)(tree),
    ],
    ids=["grad", "jvp", "vjp", "vmap", "hessian"],
)
def test_autograd_inside_a_transform_of_func_is_refused(transform):
    x = normal(3, 5, 3)
    with pytest.raises(ValueError, match="`via` is 'autograd' inside a transform"):
        transform(lambda tree: after_a_step("autograd", tree, x), some_tree())


@pytest.mark.parametrize("via", ["func", "autograd"])
def test_leaves_of_an_outer_autograd_are_differentiated_through(via):
    tree, x = some_tree(), normal(3, 5, 3)
    leaves = tree_map(lambda leaf: leaf.clone().requires_grad_(), tree)
    outer = after_a_step(via, leaves, x)
    got = torch.autograd.grad(outer, [leaves["w"][0], leaves["b"]])
    wanted = torch.func.grad(partial(after_a_step, "func"))(tree, x)
    torch.testing.assert_close(got, (wanted["w"][0], wanted["b"]), rtol=0, atol=1e3 * EPS)


@pytest.mark.parametrize("via", ["func", "autograd"])
def test_gradients_depend_on_what_the_loss_closes_over(via):
    tree, x = some_tree(), normal(3, 5, 3)

    def norm(x: Tensor, scale: Tensor, via: str) -> Tensor:
        grads = value_and_grad(lambda tree: some_loss(tree, x, scale=scale), via=via)(tree).grads
        return grads["b"].square().sum()

    x, scale = x.requires_grad_(), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    got = torch.autograd.grad(norm(x, scale, via), [x, scale])
    wanted = torch.func.grad(partial(norm, via="func"), argnums=(0, 1))(x.detach(), scale.detach())
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e3 * EPS)


def test_values_and_aux_have_gradients_of_an_outer_level():
    def loss_fn(tree, x):
        loss = some_loss(tree, x)
        return loss, 2 * loss

    tree, x = some_tree(), normal(3, 5, 3)

    def outer(tree, via):
        (loss, aux), _ = value_and_grad(loss_fn, via=via, has_aux=True)(tree, x)
        return loss + aux

    got, wanted = (value_and_grad(partial(outer, via=via), via=via)(tree) for via in ("autograd", "func"))
    torch.testing.assert_close(tuple(got), tuple(wanted), rtol=0, atol=1e3 * EPS)


def test_only_the_argument_is_differentiated_and_not_the_same_tensor_elsewhere():
    w = normal(0, 3).requires_grad_()
    got = value_and_grad(lambda v: (v * w).sum(), via="autograd")(w).grads
    assert_same(got.detach(), w.detach())
    assert_same(torch.autograd.grad(got.sum(), w)[0], torch.ones(3, dtype=torch.float64))


def test_tangents_pass_through_autograd():
    tree, x = some_tree(), normal(3, 5, 3)
    tangents = tree_map(torch.sin, tree)

    def both(via, tree):
        value, grads = value_and_grad(some_loss, via=via)(tree, x)
        return value, grads

    _, wanted = torch.func.jvp(partial(both, "func"), (tree,), (tangents,))
    with forward_ad.dual_level():
        duals = tree_map(forward_ad.make_dual, tree, tangents)
        got = both("autograd", duals)
        moved = tree_map(lambda leaf: forward_ad.unpack_dual(leaf).tangent, got)
        moved = tree_map(lambda leaf: leaf.detach(), (moved[0], {"w": moved[1]["w"], "b": moved[1]["b"]}))
    torch.testing.assert_close(moved, (wanted[0], {"w": wanted[1]["w"], "b": wanted[1]["b"]}), rtol=0, atol=1e3 * EPS)


def test_what_a_model_computes_without_the_argument_is_refused():
    model, x = torch.nn.Linear(3, 2), torch.ones(4, 3)
    weights = {name: leaf.detach() for name, leaf in model.named_parameters()}
    for loss_fn in (
        lambda tree: model(x).sum(),  # the parameters of the model, which require gradients
        lambda tree: sum(leaf.detach().sum() for leaf in tree.values()),
        lambda tree: x.sum(),
    ):
        with pytest.raises(ValueError, match="`loss_fn` returned a loss that depends on no leaf of its first argument"):
            value_and_grad(loss_fn, via="autograd")(weights)


@pytest.mark.parametrize("via", ["func", "autograd"])
@pytest.mark.parametrize(
    ("result", "described"),
    [
        (lambda w: w, r"a tensor of shape \(3,\) and dtype torch\.float64"),
        (lambda w: w[:1], r"a tensor of shape \(1,\)"),
        (lambda w: (w.sum(), 1), r"\(.*tensor\("),
        (lambda w: w.sum() > 0, r"a tensor of shape \(\) and dtype torch\.bool"),
        (lambda w: 1.0, "1.0"),
        (lambda w: None, "None"),
    ],
)
def test_a_loss_that_is_no_number_is_refused(via, result, described):
    with pytest.raises(TypeError, match=f"`loss_fn` returned {described}.* as the loss; return a 0-d tensor"):
        value_and_grad(result, via=via)(normal(0, 3))


@pytest.mark.parametrize("via", ["func", "autograd"])
def test_a_missing_aux_is_refused(via):
    with pytest.raises(TypeError, match=r"`loss_fn` returned a tensor .* for has_aux=True; return `\(loss, aux\)`"):
        value_and_grad(torch.sum, via=via, has_aux=True)(normal(0, 3))


@pytest.mark.parametrize("via", ["func", "autograd"])
@pytest.mark.parametrize("leaf", [torch.ones(2, dtype=torch.int64), torch.tensor(True), 1.0, None])
def test_a_leaf_without_a_gradient_is_refused_by_its_path(via, leaf):
    with pytest.raises(TypeError, match=r"the first argument has .* at \['w'\]\[1\], which has no gradient; pass only"):
        value_and_grad(lambda tree: tree["w"][0].sum(), via=via)({"w": [torch.ones(2), leaf]})


def test_a_leaf_that_is_changed_in_place_is_refused():
    def changes(tree):
        with torch.no_grad():
            tree["w"].mul_(2)
        return tree["w"].sum()

    def changes_openly(tree):
        return tree["w"].mul_(2).sum()

    attached = torch.ones(2).requires_grad_() * 1
    for loss_fn, leaf in ((changes, torch.ones(2)), (changes, attached), (changes_openly, attached)):
        with pytest.raises(
            ValueError, match=r"`loss_fn` changes its first argument in place, at \['w'\]; change a copy"
        ):
            value_and_grad(loss_fn, via="autograd")({"w": leaf})


def test_the_loss_may_be_a_leaf():
    assert value_and_grad(lambda w: w, via="autograd")(torch.tensor(3.0)).grads == 1
