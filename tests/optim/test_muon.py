"""Muon, for factors and for matrices."""

from functools import partial

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.utils._pytree import tree_map

from dynlora_fn import Factors, partition
from dynlora_fn.optim import muon
from dynlora_fn.testing import Shape, assert_within, eps, low_rank, normal, seeds
from tests.support.updates import DECAY, LR, MOMENTUM, moved, noise

SMALL = 2.0**-20  # a rate at which no step is too long


def polynomial(values: Tensor) -> Tensor:
    values = values / values.square().sum().sqrt()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return values


def reference(grads: list[Tensor], param: Tensor) -> Tensor:
    """Compute Muon in float64: its polynomial maps the singular values."""
    mu, param = torch.zeros_like(param), param.clone()
    for grad in grads:
        mu = MOMENTUM * mu + grad
        u, values, vh = torch.linalg.svd(grad + MOMENTUM * mu, full_matrices=False)
        param -= LR * (max(param.shape) ** 0.5 * u * polynomial(values) @ vh + DECAY * param)
    return param


@pytest.mark.parametrize("shape", [(5, 5), (7, 3), (2, 6), (1, 4)])
def test_muon_is_its_polynomial_of_the_singular_values(shape: tuple[int, int]):
    param, grads = normal(0, *shape), [normal(1 + step, *shape) for step in range(4)]
    got = moved(muon(momentum=MOMENTUM, weight_decay=DECAY), [{"w": grad} for grad in grads], {"w": param})["w"]
    # Each of five polynomials has slopes of up to 3.4445 for the errors of the last, of some 20 roundings each.
    bound = 4 * LR * max(shape) ** 0.5 * 5 * 3.4445**5 * 20 * eps(torch.float64)
    assert_within(got, reference(grads, param), bound)


def test_muon_moves_as_torch_s_does():
    """torch computes in bfloat16, so only directions agree."""
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


def polar(matrix: Tensor) -> Tensor:
    """Orthogonalize with Muon's polynomial of the singular values."""
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u * polynomial(values) @ vh


def whitened(grad: Tensor, b: Tensor, a: Tensor) -> Tensor:
    """Return the change of the weight from both updates: even directions within the factors' spans."""
    columns, rows = (torch.linalg.qr(side).Q for side in (b, a.mT))
    return polar(grad @ rows) @ rows.mT + columns @ polar(columns.mT @ grad)


def first_change(factors: Factors, grad: Tensor) -> Tensor:
    """Return the change of the weight, to first order, from one update of the factors."""
    b, a = factors
    grads = {"w": Factors(b=grad @ a.mT / a.shape[-2], a=b.mT @ grad / a.shape[-2])}
    optimizer = muon(momentum=0.0)
    updates, _ = optimizer.update(grads, optimizer.init({"w": factors}), {"w": factors}, lr=SMALL)
    update = updates["w"]
    return (update.b @ a + b @ update.a) / a.shape[-2]


@pytest.mark.parametrize("shape", [Shape(7, 9, 3), Shape(9, 4, 4), Shape(5, 5, 1)])
def test_factors_move_the_weight_by_even_directions_within_their_spans(shape: Shape):
    factors = low_rank(shape).factors
    grad = normal(3, shape.out_features, shape.in_features)
    got, wanted = first_change(factors, grad), -SMALL * max(shape[:2]) ** 0.5 * whitened(grad, *factors)
    # Damping takes at most a thousandth of the mean square over the least one of the directions of either side.
    least = min(torch.linalg.svdvals(side).square().min() / side.square().sum() for side in factors)
    assert (got - wanted).norm() <= 1e-3 / least * wanted.norm()


@given(seeds)
def test_the_change_of_the_weight_does_not_depend_on_how_it_is_factored(seed: int):
    """The tolerance comes from damping, which depends on the lengths of vectors."""
    b, a = low_rank(Shape(6, 8, 3), seed=seed).factors
    grad, lengths = normal(seed + 1, 6, 8), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    turned = torch.linalg.qr(normal(seed + 2, 3, 3)).Q
    mixed = Factors(b=b @ turned * lengths, a=(turned / lengths).mT @ a)
    torch.testing.assert_close(mixed.b @ mixed.a, b @ a)
    change, mixed_change = first_change(Factors(b, a), grad), first_change(mixed, grad)
    least = min(torch.linalg.svdvals(side).square().min() / side.square().sum() for side in (b, a, *mixed))
    assert (change - mixed_change).norm() <= 2e-3 / least * change.norm()


def test_members_of_a_stack_move_each_for_itself():
    stack = partition({"w": low_rank(Shape(5, 6, 3), (2,))}).trainable["w"]
    grads = tree_map(partial(noise, 3), stack)
    both = moved(muon(), [{"w": grads}], {"w": stack})["w"]
    for member in range(2):
        factors, grad = (tree_map(lambda leaf: leaf[member], tree) for tree in (stack, grads))  # noqa: B023, called at once
        alone = moved(muon(), [{"w": grad}], {"w": factors})["w"]
        for side, wanted in zip(both, alone, strict=True):
            torch.testing.assert_close(side[member], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("zero", ["b", "a", "both"])
def test_from_a_factor_that_is_zero_no_step_is_too_long(zero: str):
    factors = low_rank(Shape(6, 8, 3)).factors
    factors = Factors(*(side * (zero not in (name, "both")) for name, side in factors._asdict().items()))
    longest = 0.1 * sum(side.norm() for side in factors)
    grads = {"w": tree_map(partial(noise, 4), factors)}
    updates, _ = (optimizer := muon()).update(grads, optimizer.init({"w": factors}), {"w": factors}, lr=LR)
    for side in updates["w"]:
        assert side.norm() <= longest * (1 + 10 * eps(torch.float64))
    assert zero == "both" or all(side.any() for side in updates["w"])


def test_muon_wants_matrices():
    optimizer, trainable = muon(), {"bias": normal(0, 5)}
    with pytest.raises(
        ValueError, match=r"'bias' of shape \(5,\) and torch.float64, which muon cannot orthogonalize; train"
    ):
        optimizer.update(trainable, optimizer.init(trainable), trainable, lr=LR)
