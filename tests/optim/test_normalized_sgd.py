"""SCALE's update: steps of one length for each output of a matrix."""

import pytest
import torch
from torch import Tensor

from dynlora_fn import Factors
from dynlora_fn.optim import normalized_sgd
from dynlora_fn.testing import Shape, assert_same, low_rank, normal, untouched
from tests.support.updates import DECAY, LR, MOMENTUM, moved


def reference(grads: list[Tensor], matrix: Tensor, axis: int, momentum: float) -> Tensor:
    """Follow the authors' `scale_optimizer.py`: decay, then a step along the normalized mean."""
    mu, matrix = torch.zeros_like(matrix), matrix.clone()
    for grad in grads:
        mu = mu.lerp(grad, 1 - momentum)
        matrix = matrix * (1 - LR * DECAY) - LR * mu / mu.square().mean(axis, keepdim=True).sqrt()
    return matrix


@pytest.mark.parametrize("momentum", [0.0, MOMENTUM])
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 6)])
def test_it_is_the_update_of_the_authors(shape: tuple[int, ...], axis, momentum: float):
    matrix, grads = normal(0, *shape), [normal(1 + step, *shape) for step in range(3)]
    optimizer = normalized_sgd(axis=axis, momentum=momentum, weight_decay=DECAY)
    got = moved(optimizer, [{"w": grad} for grad in grads], {"w": matrix})["w"]
    torch.testing.assert_close(got, reference(grads, matrix, axis, momentum), rtol=1e-13, atol=1e-13)


def test_without_momentum_nothing_is_stored():
    params = {"w": normal(0, 3, 2, dtype=torch.bfloat16)}
    optimizer = normalized_sgd()
    state = optimizer.init(params)
    with untouched(params, state):
        updates, new = optimizer.update(params, state, params, lr=LR)
    assert state.inner.mu == {}
    assert_same(new, state)
    assert updates["w"].dtype == torch.float32


def test_an_output_without_a_gradient_stays():
    params, optimizer = {"w": normal(0, 3, 4)}, normalized_sgd(momentum=0.9)
    grads = {"w": normal(1, 3, 4) * torch.tensor([[1.0], [0.0], [1.0]])}
    updates = optimizer.update(grads, optimizer.init(params), params, lr=LR).updates["w"]
    assert not updates[1].any()
    torch.testing.assert_close(updates[::2].square().mean(-1).sqrt(), torch.full((2,), LR, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e-20, 1e-25, 1e-44])
def test_no_step_is_too_long_where_squares_have_few_digits(scale: float):
    params, optimizer = {"w": normal(0, 3, 4, dtype=torch.float32)}, normalized_sgd()
    grads = {"w": (scale * normal(1, 3, 4)).float()}
    updates = optimizer.update(grads, optimizer.init(params), params, lr=LR).updates["w"]
    assert updates.square().mean(-1).sqrt().max() <= 1.001 * LR


@pytest.mark.parametrize(
    ("leaf", "kind"),
    [
        (low_rank(Shape(4, 3, 2)).factors, "factors"),
        (normal(0, 3), r"a tensor of \(3,\) and torch.float64"),
        (torch.zeros(2, 2, dtype=torch.complex64), r"a tensor of \(2, 2\) and torch.complex64"),
    ],
)
def test_other_parameters_are_refused_by_name(leaf: Factors | Tensor, kind: str):
    with pytest.raises(ValueError, match=f"`trainable` has 'w', {kind}, but normalized_sgd trains only real matrices"):
        normalized_sgd().init({"w": leaf})


def test_another_axis_is_refused():
    with pytest.raises(ValueError, match="`axis` is 0; use -1 for the last axis or -2"):
        normalized_sgd(axis=0)  # type: ignore[arg-type]
