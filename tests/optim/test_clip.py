"""Gradients are clipped by their global norm."""

import math

import pytest
import torch
from torch.utils._pytree import tree_leaves

from dynlora_fn.optim import clip_by_global_norm
from dynlora_fn.testing import assert_same, eps
from tests.support.optimizers import some_grads, some_trainable


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_clipping_equals_torch(max_norm, dtype):
    grads = some_grads(some_trainable(dtype, stack=(2,)), 0)
    leaves = [torch.zeros_like(grad).requires_grad_() for grad in tree_leaves(grads)]
    for leaf, grad in zip(leaves, tree_leaves(grads), strict=True):
        leaf.grad = grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(leaves, max_norm)
    got = clip_by_global_norm(grads, max_norm)
    # The norm adds up 94 squares, in any order; a clipped gradient rounds three times more.
    torch.testing.assert_close(got.norm, norm, rtol=94 * eps(dtype), atol=0)
    for grad, leaf in zip(tree_leaves(got.grads), leaves, strict=True):
        torch.testing.assert_close(grad, leaf.grad, rtol=97 * eps(dtype), atol=0)
    if max_norm > norm:
        assert_same(got.grads, grads)


def test_a_tensor_clips_as_a_number_does():
    grads = some_grads(some_trainable(torch.float64), 0)
    assert_same(clip_by_global_norm(grads, torch.tensor(0.1, dtype=torch.float64)), clip_by_global_norm(grads, 0.1))
    with pytest.raises(ValueError, match=r"`max_norm` has shape \(1,\); use a number or a 0-d tensor"):
        clip_by_global_norm(grads, torch.tensor([0.1]))


def test_infinity_only_computes_the_norm():
    grads = some_grads(some_trainable(torch.float64), 0)
    got = clip_by_global_norm(grads, math.inf)
    assert_same(got.grads, grads)
    assert_same(got.norm, clip_by_global_norm(grads, 1.0).norm)


def test_the_norm_of_gradients_in_bfloat16_is_summed_in_float32():
    grads = {"w": torch.full((1000,), 0.1, dtype=torch.bfloat16)}
    got = clip_by_global_norm(grads, 1.0)
    assert got.norm.dtype == torch.float32
    assert got.grads["w"].dtype == torch.bfloat16
    wanted = grads["w"][0].item() * 1000**0.5
    assert got.norm.item() == pytest.approx(wanted, rel=1000 * eps(torch.float32))
    # Gradient, factor and product are each rounded once.
    assert got.grads["w"][0].item() == pytest.approx(1000**-0.5, rel=1.5 * eps(torch.bfloat16))
