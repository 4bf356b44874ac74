"""`via="func"` means the same where no transform runs, and autograd computes in its place."""

from typing import ClassVar

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dynlora_fn import value_and_grad
from dynlora_fn._core._torch import is_older_than
from dynlora_fn.testing import assert_same


class Records(torch.autograd.Function):
    """Notes whether operations of its backward pass are recorded."""

    modes: ClassVar[list[bool]] = []

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        Records.modes.append(torch.is_grad_enabled())
        return grad


@pytest.mark.parametrize("via", ["func", "autograd"])
def test_the_backward_pass_is_recorded_only_for_an_outer_level(via):
    """While it is recorded, nothing of the forward pass is freed."""
    Records.modes.clear()
    function = value_and_grad(lambda w: Records.apply(w).square().sum(), via=via)
    function(torch.ones(3))
    with torch.no_grad():
        function(torch.ones(3, requires_grad=True))
    assert Records.modes == [False, False]
    function(torch.ones(3, requires_grad=True))
    assert Records.modes == [False, False, True]


@pytest.mark.parametrize("via", ["func", "autograd"])
def test_aux_has_the_gradients_of_an_outer_level_and_no_others(via):
    scale = torch.tensor(2.0, requires_grad=True)

    def loss_fn(w):
        return w.square().sum(), {"outer": scale * 3, "both": scale * w.sum(), "inner": w * 2, "none": torch.ones(2)}

    (loss, aux), grads = value_and_grad(loss_fn, via=via, has_aux=True)(torch.ones(3))
    assert {name: leaf.requires_grad for name, leaf in aux.items()} == {
        "outer": True,
        "both": True,
        "inner": False,
        "none": False,
    }
    assert not loss.requires_grad
    assert not grads.requires_grad
    assert torch.autograd.grad(aux["outer"] + aux["both"], scale)[0] == 6


def test_func_gives_zeros_where_the_loss_does_not_depend_on_a_leaf():
    other = torch.ones(2, requires_grad=True)
    for loss_fn in (lambda tree: torch.ones(()), lambda tree: other.sum()):
        assert_same(value_and_grad(loss_fn)({"w": torch.ones(3)}).grads, {"w": torch.zeros(3)})
    assert value_and_grad(lambda tree: torch.ones(()))({}).grads == {}


def test_func_refuses_saved_tensor_hooks_everywhere():
    """A checkpoint inside of `call` would be recomputed with the parameters of the model."""
    w = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"`via` is 'func', which does not support saved-tensor hooks.*use `remat`"):
        value_and_grad(lambda w: checkpoint(torch.sin, w, use_reentrant=False).sum())(w)
    with pytest.raises(RuntimeError, match="does not support saved-tensor hooks"), torch.autograd.graph.save_on_cpu():
        value_and_grad(lambda w: w.sin().sum())(w)
    assert checkpoint(torch.sin, w, use_reentrant=False).shape == (3,)  # permitted again


@pytest.mark.parametrize("aux", [None, 1.0, "text"])
def test_func_refuses_an_aux_that_is_no_tensor(aux):
    with pytest.raises(TypeError, match=r"`loss_fn` returned an `aux` with .* at \['n'\]; return only tensors in it"):
        value_and_grad(lambda w: (w.sum(), {"n": aux}), has_aux=True)(torch.ones(2))


def test_arguments_that_func_changes_in_place_get_no_graph():
    total = torch.zeros(())
    value_and_grad(lambda w, total: total.add_(w.sum()) * 2)(torch.ones(2), total)
    assert total == 2
    assert not total.requires_grad


@pytest.mark.parametrize("where", ["mode", "leaf", "argument", "closure"])
def test_func_takes_inference_tensors(where):
    with torch.inference_mode():
        frozen = torch.arange(3.0)
    w, x = (frozen if where == at else torch.arange(3.0) for at in ("leaf", "argument"))
    y = frozen if where == "closure" else torch.arange(3.0)
    with torch.inference_mode(where == "mode"):
        function = value_and_grad(lambda w, x: (w.sin() * x * y).sum())
        if where == "mode" and is_older_than(2, 13):
            with pytest.raises(RuntimeError, match=r"inference mode, .* returns zeros; use `torch.no_grad`"):
                function(w, x)
            return
        grads = function(w, x).grads
    assert_same(grads.clone(), torch.arange(3.0).cos() * torch.arange(3.0) * torch.arange(3.0))


@pytest.mark.parametrize("via", ["func", "autograd"])
def test_autocast_caches_no_casts_of_leaves(via):
    """They would stay until the outermost autocast ends, though the leaves of each call are new."""
    modes = []

    def loss_fn(w):
        modes.append(torch.is_autocast_cache_enabled())
        return torch.nn.functional.linear(torch.ones(2, 3), w).float().sum()

    with torch.autocast("cpu", torch.bfloat16):
        value_and_grad(loss_fn, via=via)(torch.ones(4, 3))
        assert modes == [False]
        assert torch.is_autocast_cache_enabled()
