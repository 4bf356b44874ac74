"""Muon, for factors and for matrices, and several optimizers at once."""

from functools import partial
from typing import Any

import pytest
import torch
from strategies import Shape, assert_same, assert_within, eps, low_rank, normal
from torch import Tensor
from torch.utils._pytree import tree_map

from dynlora_fn import Factors, adamw, apply_updates, lion, multi_transform, muon, partition, sgd

MOMENTUM, DECAY, LR = 0.9, 0.5, 0.125


def reference(grads: list[Tensor], param: Tensor) -> Tensor:
    """In float64 by singular values, of which Muon's polynomial makes new ones."""
    mu, param = torch.zeros_like(param), param.clone()
    for grad in grads:
        mu = MOMENTUM * mu + grad
        u, values, vh = torch.linalg.svd(grad + MOMENTUM * mu, full_matrices=False)
        values = values / values.square().sum().sqrt()
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        param -= LR * (max(param.shape) ** 0.5 * u * values @ vh + DECAY * param)
    return param


def moved(transform: Any, grads: list[Any], trainable: Any) -> Any:
    state = transform.init(trainable)
    for own in grads:
        updates, state = transform.update(own, state, trainable, lr=LR)
        trainable = apply_updates(trainable, updates)
    return trainable


def _noise(seed: int, leaf: Tensor) -> Tensor:
    return normal(seed, *leaf.shape)


@pytest.mark.parametrize("shape", [(5, 5), (7, 3), (2, 6), (1, 4)])
def test_muon_is_its_polynomial_of_the_singular_values(shape: tuple[int, int]):
    param, grads = normal(0, *shape), [normal(1 + step, *shape) for step in range(4)]
    got = moved(muon(momentum=MOMENTUM, weight_decay=DECAY), [{"w": grad} for grad in grads], {"w": param})["w"]
    # Each of five polynomials has slopes of up to 3.4445 for the errors of the last, of some 20 roundings each.
    bound = 4 * LR * max(shape) ** 0.5 * 5 * 3.4445**5 * 20 * eps(torch.float64)
    assert_within(got, reference(grads, param), bound)


def test_muon_moves_as_torch_s_does():
    """Which computes in bfloat16, so that directions alone agree."""
    param, grads = (
        normal(0, 6, 4, dtype=torch.float32),
        [normal(1 + step, 6, 4, dtype=torch.float32) for step in range(3)],
    )
    leaf = param.clone().requires_grad_()
    theirs = torch.optim.Muon([leaf], lr=LR, weight_decay=0.0, momentum=MOMENTUM)
    state = (ours := muon(momentum=MOMENTUM)).init({"w": param})
    for grad in grads:
        before, leaf.grad = leaf.detach().clone(), grad
        theirs.step()
        updates, state = ours.update({"w": grad}, state, {"w": param}, lr=LR)
        wanted = leaf.detach() - before
        assert torch.cosine_similarity(updates["w"].flatten(), wanted.flatten(), dim=0) > 0.99


def test_members_of_a_stack_and_both_factors_move_each_for_itself():
    stack = partition({"w": low_rank(Shape(5, 6, 3), (2,))}).trainable["w"]
    grads = tree_map(lambda leaf: normal(3, *leaf.shape), stack)
    both = moved(muon(), [{"w": grads}], {"w": stack})["w"]
    for side in ("b", "a"):
        for member in range(2):
            own, grad = getattr(stack, side)[member], getattr(grads, side)[member]
            torch.testing.assert_close(
                getattr(both, side)[member], moved(muon(), [{"w": grad}], {"w": own})["w"], rtol=1e-12, atol=1e-12
            )


def test_muon_wants_matrices():
    optimizer, trainable = muon(), {"bias": normal(0, 5)}
    with pytest.raises(ValueError, match=r"`trainable` must be matrices to be trained by muon, got shape \(5,\)"):
        optimizer.update(trainable, optimizer.init(trainable), trainable, lr=LR)


def test_every_parameter_moves_as_with_its_own_transform_alone():
    trainable = partition({"w": low_rank(Shape(5, 6, 3)), "bias": normal(1, 5), "head": normal(2, 4, 5)}).trainable
    own = {"w": sgd(), "bias": adamw(), "head": lion()}
    optimizer = multi_transform(own, lambda name, leaf: name)
    grads = [tree_map(partial(_noise, step), trainable) for step in range(3)]
    got = moved(optimizer, grads, trainable)
    assert list(got) == list(trainable)
    for name, transform in own.items():
        alone = moved(transform, [{name: grad[name]} for grad in grads], {name: trainable[name]})
        assert_same(got[name], alone[name])


def test_a_rate_by_name_reaches_the_transform():
    trainable = {"a": normal(0, 3), "b": normal(1, 3)}
    optimizer = multi_transform({"all": sgd(momentum=0.0)}, lambda name, leaf: "all")
    updates, _ = optimizer.update(trainable, optimizer.init(trainable), trainable, lr={"a": 0.5, "b": 0.0})
    assert_same(updates["a"], -0.5 * trainable["a"])
    assert not updates["b"].any()


def test_a_transform_that_is_not_there_is_refused():
    optimizer = multi_transform({"sgd": sgd()}, lambda name, leaf: "adam")
    with pytest.raises(ValueError, match="`choose` must name one of sgd for 'w', got 'adam'"):
        optimizer.init({"w": Factors(b=normal(0, 3, 1), a=normal(0, 1, 3))})
