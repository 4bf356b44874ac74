"""What the factors miss goes into the base, in a fixed size, and nothing else changes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dynlora_fn as dl
from dynlora_fn import Factors, LowRank
from dynlora_fn.bases._base import as_base
from dynlora_fn.optim import compensate, project_gradients
from dynlora_fn.testing import PLAIN, Shape, assert_same, assert_within, dtypes, eps, low_rank, normal, untouched
from tests.support.strategies import plain_params, quantized_params

NORMALIZE = ["spectrum", "rows"]
SHAPE = Shape(6, 8, 2)


def rest_of(param: LowRank, grad: Tensor) -> Tensor:
    """In float64, by the pseudo-inverse."""
    b, a = (leaf.double() for leaf in param.factors)
    out, in_ = param.shape[-2:]
    left = torch.eye(out).double() - b @ torch.linalg.pinv(b)
    right = torch.eye(in_).double() - torch.linalg.pinv(a) @ a
    return left @ grad.double() @ right


def normalized(rest: Tensor, normalize: str) -> Tensor:
    """By the definition: each row, or each singular value, by itself."""
    if normalize == "rows":
        return rest / rest.square().mean(-1, keepdim=True).sqrt()
    u, values, v = torch.linalg.svd(rest, full_matrices=False)
    values = values / values.norm(dim=-1, keepdim=True)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return u @ torch.diag_embed(values) @ v * max(rest.shape[-2:]) ** 0.5


def change(param: LowRank, grad: Tensor, normalize: str, lr: float = 0.5) -> Tensor:
    return compensate(param, grad, lr=lr, normalize=normalize).base.double() - param.base.double()


@st.composite
def cases(draw: st.DrawFn) -> tuple[LowRank, Tensor]:
    """Any weight, and a gradient that may be zero in some rows."""
    param = draw(plain_params(storages=PLAIN[:2]))
    grad = normal(draw(st.integers(0, 99)), *param.shape, dtype=draw(dtypes))
    return param, grad * (torch.arange(param.shape[-2]) % 3 < draw(st.integers(0, 3)))[:, None]


@given(cases(), st.sampled_from(NORMALIZE))
def test_only_the_base_changes_and_of_it_what_the_factors_do_not_reach(case, normalize):
    param, grad = case
    with untouched(param, grad):
        new = compensate(param, grad, lr=0.5, normalize=normalize)
    assert_same(new._replace(base=param.base), param)
    assert (new.base.shape, new.base.dtype) == (param.base.shape, param.base.dtype)
    moved = new.base.double() - param.base.double()
    a = param.factors.a.double()
    a, size = a / a.norm(dim=-1, keepdim=True).clamp(min=1e-9), max(param.shape[-2:]) * param.shape[-1] ** 0.5
    bound = 1e3 * eps(torch.float32) * size
    assert_within(moved @ a.mT, torch.zeros_like(moved @ a.mT), bound)


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("stack", [(), (3,), (2, 2)])
@pytest.mark.parametrize("shape", [SHAPE, Shape(8, 6, 2), Shape(5, 9, 4), Shape(7, 7, 1)])
def test_the_change_is_what_the_definition_says(shape, stack, normalize):
    param, grad = low_rank(shape, stack), normal(1, *stack, *shape[:2])
    wanted = -0.5 * normalized(rest_of(param, grad), normalize)
    assert_within(change(param, grad, normalize), wanted, 1e-9 * wanted.abs().max())
    assert (change(param, grad, normalize) * grad).sum() < 0


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_its_size_does_not_depend_on_the_gradients(normalize):
    param, grad = low_rank(SHAPE), normal(1, 6, 8)
    assert_within(change(param, 1e6 * grad, normalize), change(param, grad, normalize), 1e-12)
    assert_within(change(param, 1e-12 * grad, normalize), change(param, grad, normalize), 1e-12)


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_members_of_a_stack_know_nothing_of_each_other(normalize):
    """However much larger the gradient of one of them is."""
    param, grads = (
        low_rank(SHAPE, (2,)),
        normal(1, 2, 6, 8) * torch.tensor([1.0, 1e-20], dtype=torch.float64)[:, None, None],
    )
    for got, member, grad in zip(change(param, grads, normalize), (0, 1), grads, strict=True):
        alone = LowRank(param.base[member], Factors(*(leaf[member] for leaf in param.factors)), param.seed[member])
        assert_within(got, change(alone, grad, normalize), 1e-12)


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(seed=st.integers(0, 99))
def test_nothing_changes_where_factors_reach_all(dtype, normalize, seed):
    """Rounding errors are not blown up to the size of a change."""
    for shape in (Shape(4, 8, 4), Shape(8, 4, 4), Shape(1, 5, 1)):
        param = low_rank(shape, seed=seed, base_dtype=dtype, factor_dtype=dtype)
        assert_same(compensate(param, normal(seed, *shape[:2], dtype=dtype), lr=0.5, normalize=normalize), param)
    param = low_rank(SHAPE, base_dtype=dtype, factor_dtype=dtype)
    assert_same(compensate(param, torch.zeros(6, 8, dtype=dtype), lr=0.5, normalize=normalize), param)
    inside = normal(seed, 6, 2, dtype=dtype) @ param.factors.a
    assert_same(compensate(param, inside, lr=0.5, normalize=normalize), param)


def test_vectors_that_are_zero_or_equal_span_nothing():
    param = low_rank(SHAPE)
    zero = param._replace(factors=param.factors._replace(b=torch.zeros_like(param.factors.b)))
    grad = normal(1, 6, 8)
    assert_within(change(zero, grad, "spectrum"), -0.5 * normalized(rest_of(zero, grad), "spectrum"), 1e-9)
    first = param._replace(factors=Factors(param.factors.b * torch.tensor([0.0, 1.0]), param.factors.a))
    assert_within(change(first, grad, "spectrum"), -0.5 * normalized(rest_of(first, grad), "spectrum"), 1e-9)
    equal = param._replace(factors=Factors(*(leaf.clone() for leaf in param.factors)))
    equal.factors.a[1] = 2 * equal.factors.a[0]
    assert_within(change(equal, grad, "spectrum"), -0.5 * normalized(rest_of(equal, grad), "spectrum"), 1e-9)


@given(quantized_params(), st.sampled_from(NORMALIZE))
def test_a_base_in_low_precision_is_folded_into_as_by_a_switch(param, normalize):
    grad = normal(3, *param.shape, dtype=torch.float32)
    wide = torch.promote_types(torch.float32, param.factors.b.dtype)
    zero = param._replace(base=torch.zeros(param.shape, dtype=wide))
    moved = compensate(zero, grad, lr=1e-2, normalize=normalize).base
    eye = torch.eye(param.shape[-1], dtype=wide).expand(*moved.shape[:-2], -1, -1)
    with untouched(param, grad):
        got = compensate(param, grad, lr=1e-2, normalize=normalize)
    assert_same(got, param._replace(base=as_base(param.base).fold(moved, eye, divisor=1, name="w")))


def test_changes_below_a_quantization_step_add_up():
    param = dl.bases.quantize(low_rank(Shape(8, 16, 4), base_dtype=torch.float32), "int8")
    exact = param._replace(base=param.base.dequantize(torch.float32))
    step, grad = float(exact.base.abs().max()) / 127, normal(1, 8, 16)
    before = dl.materialize(exact)
    for _ in range(40):
        param, exact = (compensate(weight, grad, lr=step / 20) for weight in (param, exact))
    assert (dl.materialize(exact) - before).abs().max() > 2 * step
    assert_within(dl.materialize(param), dl.materialize(exact), step)


def test_a_deferred_base_is_folded_into_below_what_waits():
    param = dl.bases.quantize(low_rank(Shape(8, 16, 4), base_dtype=torch.float32), "int8")
    waiting, grad = dl.bases.defer(param, vectors=4), normal(1, 8, 16)
    got = compensate(waiting, grad, lr=1e-2)
    assert_same(got.base.base, compensate(param, grad, lr=1e-2).base)
    assert_same(got.base.pending, waiting.base.pending)


def test_weights_by_name():
    params = {"x": low_rank(SHAPE), "y": low_rank(SHAPE, seed=1), "z": normal(0, 3), "w": low_rank(SHAPE, seed=2)}
    grads = {"x": normal(1, 6, 8), "y": normal(2, 6, 8), "z": normal(3, 3)}
    got = compensate(params, grads, lr={"x": 0.1, "y": torch.tensor(0.2)})
    assert list(got) == list(params)
    assert_same(got["x"], compensate(params["x"], grads["x"], lr=0.1))
    assert_same(got["y"], compensate(params["y"], grads["y"], lr=torch.tensor(0.2)))
    assert got["z"] is params["z"]
    assert got["w"] is params["w"]


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_compiled_it_is_the_same_for_any_rate(normalize):
    params = {"w": low_rank(SHAPE, (2,), base_dtype=torch.float32, factor_dtype=torch.float32)}
    grads = {"w": normal(1, 2, 6, 8, dtype=torch.float32)}

    def step(state, lr):
        return compensate(state, grads, lr=lr, normalize=normalize), None

    compiled = dl.compile_step(step, backend="aot_eager", donate=False)
    compiled(params, torch.tensor(0.1))
    with torch.compiler.set_stance("fail_on_recompile"):
        for lr in (torch.tensor(0.1), torch.tensor(0.2)):
            assert_same(compiled(params, lr).state, compensate(params, grads, lr=lr, normalize=normalize))


@pytest.mark.parametrize("path", ["factored", "merged", "dense"])
def test_projected_gradients_are_those_by_the_factors(path):
    param, x = low_rank(SHAPE), normal(1, 5, 8)

    def loss(factors: Factors) -> Tensor:
        return dl.linear(x, param._replace(factors=factors), path=path).square().sum()

    wanted = dl.value_and_grad(loss)(param.factors).grads
    dense = dl.value_and_grad(lambda weight: (x @ weight.mT).square().sum())(dl.materialize(param)).grads
    got = project_gradients({"w": dense, "bias": dense[0]}, {"w": param, "bias": param.base[0]})
    for side, expected in zip(got["w"], wanted, strict=True):
        assert_within(side, expected, 1e-12 * expected.abs().max())
    assert_same(got["bias"], dense[0])


@given(plain_params())
def test_projected_gradients_keep_shapes_and_dtypes(param):
    got = project_gradients({"w": normal(1, *param.shape, dtype=torch.float32)}, {"w": param})["w"]
    for side, factor in zip(got, param.factors, strict=True):
        assert (side.shape, side.dtype) == (factor.shape, factor.dtype)


def test_a_gradient_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"`grads` must have the weight's shape \(6, 8\) for 'w', got \(8, 6\)"):
        compensate({"w": low_rank(SHAPE)}, {"w": torch.ones(8, 6)}, lr=0.1)


def test_an_unknown_way_to_normalize_is_refused():
    with pytest.raises(ValueError, match="`normalize` must be 'spectrum' or 'rows', got 'columns'"):
        compensate(low_rank(SHAPE), torch.ones(6, 8), lr=0.1, normalize="columns")


def test_a_weight_that_is_not_finite_is_named():
    param = dl.bases.quantize(low_rank(Shape(8, 16, 4), base_dtype=torch.float32), "int8")
    with pytest.raises(ValueError, match="weight 'w'"):
        compensate({"w": param}, {"w": torch.full((8, 16), torch.nan)}, lr=0.1)


def test_autocast_does_not_round_the_gradients_of_factors():
    param, grad = low_rank(SHAPE, factor_dtype=torch.float32, base_dtype=torch.float32), normal(0, 6, 8).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = project_gradients({"w": grad}, {"w": param})
    assert_same(got, project_gradients({"w": grad}, {"w": param}))
