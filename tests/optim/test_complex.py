"""Complex parameters are trained as pairs of real numbers, as torch.optim trains them."""

import pytest
import torch

import dynlora_fn as dl
from dynlora_fn.optim import adamw, clip_by_global_norm, lion, multi_transform, muon, sgd
from dynlora_fn.testing import assert_same, normal

REAL = normal(0, 3, 2)
PARAMETER = torch.view_as_complex(REAL)


def gradient(step: int) -> torch.Tensor:
    return torch.view_as_complex(normal(step + 1, 3, 2))


@pytest.mark.parametrize(
    ("optimizer", "theirs"),
    [
        (adamw(weight_decay=0.1), lambda tensors: torch.optim.AdamW(tensors, lr=0.1, weight_decay=0.1)),
        (sgd(momentum=0.9), lambda tensors: torch.optim.SGD(tensors, lr=0.1, momentum=0.9)),
        (
            multi_transform({"all": adamw()}, lambda name, leaf: "all"),
            lambda x: torch.optim.AdamW(x, lr=0.1, weight_decay=0),
        ),
    ],
)
def test_steps_are_those_of_torch(optimizer, theirs):
    tensor = PARAMETER.clone().requires_grad_()
    reference, trainable = theirs([tensor]), {"filter": PARAMETER}
    opt_state = optimizer.init(trainable)
    for step in range(3):
        tensor.grad = gradient(step)
        reference.step()
        updates, opt_state = optimizer.update({"filter": gradient(step)}, opt_state, trainable, lr=0.1)
        trainable = dl.apply_updates(trainable, updates)
    torch.testing.assert_close(trainable["filter"], tensor.detach())


def test_lion_moves_both_parts_by_the_rate():
    optimizer, trainable = lion(), {"filter": PARAMETER}
    updates, _ = optimizer.update({"filter": gradient(0)}, optimizer.init(trainable), trainable, lr=0.1)
    torch.testing.assert_close(torch.view_as_real(updates["filter"]), -0.1 * torch.view_as_real(gradient(0)).sign())


def test_the_norm_is_that_of_torch():
    clipped = clip_by_global_norm({"filter": gradient(0)}, 0.5)
    tensor = PARAMETER.clone().requires_grad_()
    tensor.grad = gradient(0)
    torch.testing.assert_close(clipped.norm, torch.nn.utils.clip_grad_norm_([tensor], 0.5).to(clipped.norm))
    torch.testing.assert_close(clipped.grads["filter"], tensor.grad)


def test_muon_refuses_complex_matrices():
    optimizer, trainable = muon(), {"filter": PARAMETER[None]}
    with pytest.raises(ValueError, match=r"'filter' of shape \(1, 3\) and torch.complex128, which muon cannot"):
        optimizer.update(trainable, optimizer.init(trainable), trainable, lr=0.1)


@pytest.mark.parametrize("optimizer", [adamw(), sgd(), lion()], ids=["adamw", "sgd", "lion"])
def test_a_lazy_conjugate_is_a_gradient_and_a_parameter(optimizer):
    """`torch.func.grad` returns them."""
    trainable, x = {"filter": PARAMETER}, gradient(1)
    grads = torch.func.grad(lambda tree: (x * tree["filter"].conj()).real.square().sum())(trainable)
    assert grads["filter"].is_conj()
    for tree in (trainable, {"filter": PARAMETER.conj()}):
        state = optimizer.init(tree)
        resolved = {"filter": tree["filter"].resolve_conj()}
        got = optimizer.update(grads, state, tree, lr=0.1)
        assert_same(got, optimizer.update({"filter": grads["filter"].resolve_conj()}, state, resolved, lr=0.1))
    assert_same(clip_by_global_norm(grads, 0.1).norm, clip_by_global_norm({"filter": grads["filter"] + 0}, 0.1).norm)
