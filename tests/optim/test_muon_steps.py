"""Polynomials and coupled steps of Muon, against singular value decompositions in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dynlora_fn import Factors, partition
from dynlora_fn.optim import muon, normalized_sgd
from dynlora_fn.optim._polynomial import _POLAR_EXPRESS, PRESETS, check_coefficients, orthogonalize
from dynlora_fn.testing import Shape, assert_same, low_rank, normal

LR = 2.0**-20  # at which no step is too long
CUSHION = 0.02407327424182761  # of the upper end, from which on the published rows are the best ones
KINDS: dict[str, dict[str, Any]] = {
    "separate": {"coefficients": "polar_express_8"},
    "coupled once": {"coefficients": "polar_express_8", "coupled": 1},
    "coupled": {"coefficients": "polar_express_8", "coupled": 3},
}


def applied(table: Any, values: Any) -> Any:
    for a, b, c in table:
        values = a * values + b * values**3 + c * values**5
    return values


def test_each_row_of_polar_express_is_the_best_for_what_the_rows_before_it_leave():
    """The error of the best polynomial has one size and alternating signs at four points."""
    least, most = 1e-3, 1.0
    for row in _POLAR_EXPRESS:
        a, b, c = row
        inner = np.sqrt((-3 * b + np.array([-1, 1]) * np.sqrt(9 * b**2 - 20 * a * c)) / (10 * c))
        low, high, low_again, high_again = applied([row], np.array([max(least, CUSHION * most), *inner, most]))
        assert low == pytest.approx(low_again, abs=1e-9)
        assert high == pytest.approx(high_again, abs=1e-9)
        least = applied([row], least)
        assert least + high_again == pytest.approx(2, abs=1e-9)
        most = high_again


@pytest.mark.parametrize(
    ("name", "smallest", "least", "most"),
    [
        ("jordan", 1e-2, 0.68, 1.14),
        ("polar_express_5", 1e-3, 0.84, 1.13),
        ("polar_express_8", 1e-3, 0.999, 1.001),
    ],
)
def test_a_preset_brings_singular_values_into_its_interval(name: str, smallest: float, least: float, most: float):
    values = applied(PRESETS[name], torch.logspace(np.log10(smallest), 0, 10_000, dtype=torch.float64))
    assert least <= values.min()
    assert values.max() <= most


@pytest.mark.parametrize("shape", [(3, 8), (9, 4), (5, 6), (1, 7)])
@pytest.mark.parametrize("coefficients", [*PRESETS, [(1.5, -0.5, 0.0)], np.full((2, 3), 0.3)], ids=str)
def test_a_matrix_gets_the_polynomials_of_its_singular_values(coefficients: Any, shape: tuple[int, int]):
    matrix, table = normal(0, 2, *shape), check_coefficients(coefficients)
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    wanted = u * applied(table, values / values.square().sum(-1, keepdim=True).sqrt())[..., None, :] @ vh
    torch.testing.assert_close(orthogonalize(matrix, table), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("coefficients", "error", "message"),
    [
        ("newton", ValueError, r"`coefficients` must be one of jordan, .*, got 'newton'"),
        ([], ValueError, "`coefficients` has no rows"),
        (
            [(1.0, 2.0)],
            TypeError,
            r"`coefficients` is \[\(1.0, 2.0\)\]; pass the name of a preset, or rows of 3 numbers",
        ),
        (1.0, TypeError, "`coefficients` is 1.0; pass"),
        ([(1.0, float("nan"), 0.0)], ValueError, "`coefficients` is nan; use a finite number"),
    ],
)
def test_what_is_no_table_is_refused(coefficients: Any, error: type, message: str):
    with pytest.raises(error, match=message):
        muon(coefficients=coefficients)


def updated(factors: Factors, grads: Factors, **settings: Any) -> Factors:
    optimizer = muon(momentum=0.0, **settings)
    updates = optimizer.update({"w": grads}, optimizer.init({"w": factors}), {"w": factors}, lr=LR).updates["w"]
    assert isinstance(updates, Factors)
    return updates


def gradients(factors: Factors, grad: Tensor) -> Factors:
    b, a = (side.to(torch.float64) for side in factors)
    rank = a.shape[-2]
    return tree_map(lambda side: side.to(factors.b.dtype), Factors(grad @ a.mT / rank, b.mT @ grad / rank))


def change(factors: Factors, grad: Tensor, **settings: Any) -> Tensor:
    """Return the change of the weight to first order, in units of its learning rate."""
    updates = updated(factors, gradients(factors, grad), **settings)
    (b, a), (step_b, step_a) = (tree_map(Tensor.double, each) for each in (factors, updates))
    out, inner = b.shape[-2], a.shape[-1]
    return (step_b @ a + b @ step_a) / (a.shape[-2] * LR * max(out, inner) ** 0.5)


def some(shape: Shape, seed: int = 0) -> tuple[Factors, Tensor]:
    return low_rank(shape, seed=seed).factors, normal(seed + 3, *shape[:2])


@pytest.mark.parametrize("projections", [1, 3, 6])
@pytest.mark.parametrize("shape", [Shape(48, 64, 8), Shape(64, 256, 16), Shape(20, 20, 5)])
def test_a_coupled_change_is_that_of_repeated_projections_of_the_dense_one(shape: Shape, projections: int):
    """LoRA-TSD in dense matrices: orthogonalize, then project on the tangent space, several times."""
    factors, grad = some(shape)
    columns, rows = (torch.linalg.qr(side).Q for side in (factors.b, factors.a.mT))

    def project(matrix: Tensor) -> Tensor:
        rest = matrix - columns @ (columns.mT @ matrix)
        return matrix - (rest - (rest @ rows) @ rows.mT)

    wanted = project(grad)
    for _ in range(projections):
        u, _, vh = torch.linalg.svd(wanted, full_matrices=False)
        directions = 2 * shape.rank  # the others are zero
        wanted = project(u[:, :directions] @ vh[:directions])
    got = change(factors, grad, coefficients="polar_express_8", coupled=projections)
    least = min(torch.linalg.svdvals(side).square().min() / side.square().mean() / max(side.shape) for side in factors)
    assert (got + wanted).norm() <= 2e-3 / least * wanted.norm()  # damping, by a thousandth of the mean square


@pytest.mark.parametrize(("projections", "least", "most"), [(1, 0.5, 1.2), (3, 0.88, 1.1), (6, 0.98, 1.015)])
@pytest.mark.parametrize("shape", [Shape(48, 64, 8), Shape(128, 96, 16)])
def test_coupled_sides_move_the_weight_evenly(shape: Shape, projections: int, least: float, most: float):
    for seed in range(3):
        moved = change(*some(shape, seed), coefficients="polar_express_8", coupled=projections)
        values = torch.linalg.svdvals(moved)[: 2 * shape.rank]
        assert least <= values[-1] <= values[0] <= most
        if projections == 6:
            assert values[0] <= 1.03 * values[-1]


def edge(name: str, shape: Shape) -> tuple[Factors, Tensor]:
    """Return factors and a dense gradient where a Gram matrix is singular."""
    (b, a), grad = some(shape)
    lengths = torch.logspace(0, -3, shape.rank, dtype=torch.float64)
    edges = {
        "b = 0": (torch.zeros_like(b), a, grad),
        "no gradient": (b, a, torch.zeros_like(grad)),
        "gradient of rank 1": (b, a, grad[:, :1] @ grad[:1]),
        "gradient in the columns of b": (b, a, b @ normal(5, *a.shape)),
        "gradient in both spans": (b, a, b @ normal(5, shape.rank, shape.rank) @ a),
        "equal vectors": (b[:, :1].expand_as(b), a[:1].expand_as(a), grad),
        "long and short vectors": (b * lengths, lengths[:, None] * a, grad),
        "tiny gradient": (b, a, 1e-15 * grad),
        "huge gradient": (b, a, 1e12 * grad),
    }
    b, a, grad = edges[name]
    return Factors(b.float(), a.float()), grad


@pytest.mark.parametrize("shape", [Shape(12, 16, 4), Shape(6, 6, 1), Shape(8, 24, 8), Shape(64, 32, 32)])
@pytest.mark.parametrize(
    "name",
    [
        "b = 0",
        "no gradient",
        "gradient of rank 1",
        "gradient in the columns of b",
        "gradient in both spans",
        "equal vectors",
        "long and short vectors",
        "tiny gradient",
        "huge gradient",
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_no_direction_is_too_long_where_a_gram_matrix_is_singular(kind: str, name: str, shape: Shape):
    factors, grad = edge(name, shape)
    moved = change(factors, grad, **KINDS[kind])
    longest = torch.linalg.svdvals(moved)[0]
    assert longest <= (2.01 if kind == "separate" else 1.2)  # a NaN is not
    assert longest == 0 if name == "no gradient" else longest > 0.5


@pytest.mark.parametrize("scale", [1e-19, 1e-20, 1e-22, 1e-30, 1e-44])
def test_no_step_is_too_long_where_squares_have_few_digits(scale: float):
    """A Gram matrix of numbers below the smallest normal one is rounded to few digits, or to zero."""
    factors, grad = edge("huge gradient", Shape(12, 16, 4))
    small = (scale / 1e12) * gradients(factors, grad).b.double()
    grads = Factors(small.float(), torch.zeros_like(factors.a))
    trainable = partition({"w": low_rank(Shape(12, 16, 4), trained="b", factor_dtype=torch.float32)}).trainable
    one_sided = trainable["w"]._replace(b=grads.b)
    for kind in KINDS.values():
        updates = updated(factors, grads, **kind)
        wanted = updated(factors, Factors((small / scale).float(), grads.a), **kind)
        assert updates.b.norm() <= 1.01 * wanted.b.norm()
    optimizer = muon(coefficients="polar_express_8")
    step = optimizer.update({"w": one_sided}, optimizer.init(trainable), trainable, lr=1.0).updates["w"].b
    assert torch.linalg.matrix_norm(step, 2) <= 1.01 * (4 * 16) ** 0.5
    for matrix in (grads.b, grads.b[:4], grads.b.double()):
        assert torch.linalg.matrix_norm(orthogonalize(matrix, PRESETS["polar_express_8"]), 2) <= 1.01


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_factors_without_a_gradient_stay(kind: str, dtype: torch.dtype):
    zeros = Factors(torch.zeros(4, 2, dtype=dtype), torch.zeros(2, 3, dtype=dtype))
    assert_same(tree_map(torch.abs, updated(zeros, zeros, **KINDS[kind])), zeros)


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_of_the_weight_without_a_gradient_stays(kind: str):
    """The other block shares no row, no column and no vector with it."""
    factors, grad = some(Shape(12, 10, 4))
    b, a, grad = factors.b.clone(), factors.a.clone(), grad.clone()
    for matrix in (b[:6, 2:], b[6:, :2], a[:2, 5:], a[2:, :5], grad[:6, 5:], grad[6:]):
        matrix.zero_()
    updates = updated(Factors(b, a), gradients(Factors(b, a), grad), **KINDS[kind])
    for rest in (updates.b[:, 2:], updates.a[2:], updates.b[6:], updates.a[:, 5:]):
        assert rest.abs().max() < 1e-6 * updates.b.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_a_vmapped_step_is_the_loop(kind: str):
    factors, _ = some(Shape(6, 9, 3))
    grads = Factors(*(normal(index, 2, *side.shape) for index, side in enumerate(factors)))
    both = torch.vmap(lambda grads: updated(factors, grads, **KINDS[kind]))(grads)
    for member in range(2):
        alone = updated(factors, tree_map(lambda leaf: leaf[member], grads), **KINDS[kind])  # noqa: B023, called at once
        torch.testing.assert_close(tree_map(lambda leaf: leaf[member], both), alone, rtol=1e-9, atol=0)  # noqa: B023


def test_without_nesterov_the_direction_is_the_moment():
    factors, _ = some(Shape(6, 9, 3))
    first, second = ({"w": tree_map(lambda leaf: normal(seed, *leaf.shape), factors)} for seed in (1, 2))  # noqa: B023
    optimizer, params = muon(momentum=0.5, nesterov=False), {"w": factors}
    state = optimizer.update(first, optimizer.init(params), params, lr=LR).opt_state
    got = optimizer.update(second, state, params, lr=LR)
    moment = tree_map(lambda old, new: 0.5 * old + new, first, second)
    assert_same(got.opt_state.inner.mu, moment)
    assert_same(got.updates["w"], updated(factors, moment["w"]))


@pytest.mark.parametrize("coupled", [0, 1])
@pytest.mark.parametrize("lr", [0, 0.0, torch.tensor(0.0)], ids=repr)
def test_factors_of_zeros_do_not_move_at_a_rate_of_zero(coupled: int, lr: Any):
    optimizer, zeros = muon(coupled=coupled), {"w": Factors(torch.zeros(4, 2), torch.zeros(2, 3))}
    updates, _ = optimizer.update(zeros, optimizer.init(zeros), zeros, lr=lr)
    assert not any(leaf.isnan().any() or leaf.any() for leaf in updates["w"])


@pytest.mark.parametrize("optimizer", [muon(), normalized_sgd()], ids=["muon", "normalized_sgd"])
@pytest.mark.parametrize("name", ["layers.*.bias", "{1..3}.bias", "*.*.bias"])
def test_a_stack_of_vectors_is_no_matrix(optimizer: Any, name: str):
    trainable = {name: normal(0, *(2,) * name.count(".*"), 3, 8)} if "*.*" in name else {name: normal(0, 3, 8)}
    with pytest.raises(ValueError, match="train it with another optimizer"):
        optimizer.update(trainable, optimizer.init(trainable), trainable, lr=0.1)
