"""Operations with unusual operands equal those of the dense weight, or raise what torch raises for them."""

import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from dynlora_fn import LowRank, call, combine, init, linear, partition, value_and_grad
from dynlora_fn.testing import Shape, assert_same, low_rank, normal
from tests.support.uses import Uses, dense

pytestmark = pytest.mark.filterwarnings("ignore:low-rank weight")

PARAM: LowRank = low_rank(Shape(6, 4, 2), seed=3)
IDS = torch.tensor([[0, 3], [5, 1]])
X, Y = normal(1, 3, 4), normal(2, 3, 6)
TURNS = torch.polar(torch.ones(6), torch.arange(6.0)).to(torch.complex128)
OFFSETS = torch.tensor([2, 4, 6], dtype=torch.int32)
MASK = torch.tensor([True, False] * 3)

VALUES = {
    "permute by keyword": lambda w: torch.permute(w, dims=(1, 0)) * 1,
    "reshape by keyword": lambda w: torch.reshape(w, shape=(2, 3, 4)) * 1,
    "mask in einsum": lambda w: torch.einsum("o,oi->oi", MASK, w),
    "integers in einsum": lambda w: torch.einsum("b,oi->boi", torch.tensor([1, 2]), w),
    "complex operand in einsum": lambda w: torch.einsum("bi,oi,o->bo", X, w, TURNS).abs(),
    "operands of two dtypes in einsum": lambda w: torch.einsum("o,bi,oi->bo", X.new_ones(6).float(), X, w),
    "only a weight in einsum": lambda w: torch.einsum("oi->io", w) * 1,
    "a flag and a slice": lambda w: w[True, 1:3] * 1,
    "bytes over both axes": lambda w: w[(torch.arange(24).reshape(6, 4) % 3).byte()],
    "lists in a list": lambda w: w[[[0, 1, 2], [1, 0, 3]]],
    "tuple of rows": lambda w: w[(0, 2), :],
    "slices in a list": lambda w: w[[slice(0, 2), 1]],
    "product without an input": lambda w: torch.addmm(torch.full((3, 4), torch.nan).double(), Y, w, beta=0),
    "inner with a number": lambda w: torch.inner(w, normal(3, 1)[0]),
    "divided by an integer": lambda w: functional.linear(X, w / torch.tensor(3)),
    "two multiples": lambda w: functional.linear(X, (w * 0.1) * torch.tensor(0.3)),
    "sparse input": lambda w: torch.mm(Y.to_sparse(), w),
    "sparse rows": lambda w: Y.to_sparse_csr() @ w,
    "bias of one entry for joined weights": lambda w: functional.linear(X, torch.cat([w, w]), X[0, :1]),
    "bias for each row": lambda w: functional.linear(X, w, Y),
    "nested input": lambda w: functional.linear(torch.nested.nested_tensor([X, X[:2]]), w).to_padded_tensor(0),
}


@pytest.mark.filterwarnings(
    "ignore:Sparse CSR", "ignore:The PyTorch API of nested", "ignore:Using a non-tuple", "ignore:indexing with"
)
@pytest.mark.parametrize("name", VALUES)
def test_a_use_has_the_value_and_gradients_of_the_dense_weight(name):
    model = Uses(VALUES[name], (6, 4))
    trainable, frozen = partition({"weight": PARAM})

    def of(function):
        def loss_fn(tree):
            output = function(combine(tree, frozen)["weight"])
            return output.square().sum(), output

        return value_and_grad(loss_fn, via="autograd", has_aux=True)(trainable)

    got = of(lambda param: call(model, {"weight": param}))
    wanted = of(lambda param: functional_call(model, {"weight": dense(param, (6, 4))}))
    torch.testing.assert_close(tuple(got), tuple(wanted), rtol=1e-12, atol=1e-12)


REFUSED = {
    "negative index": lambda w: functional.embedding(IDS - 1, w),
    "flags as indices": lambda w: functional.embedding(MASK, w),
    "bytes as indices": lambda w: functional.embedding(MASK.byte(), w),
    "padding outside": lambda w: functional.embedding(IDS, w, padding_idx=6),
    "narrow too far": lambda w: w.narrow(0, 3, 5),
    "unsqueeze outside": lambda w: w.unsqueeze(4),
    "unbind outside": lambda w: w.unbind(2),
    "transpose outside": lambda w: w.transpose(0, 2),
    "cat outside": lambda w: torch.cat([w, w], dim=-3),
    "no chunks": lambda w: w.chunk(0),
    "empty pieces": lambda w: w.split(0),
    "too few sizes": lambda w: w.expand(4),
    "no size and an unknown one": lambda w: w.reshape(-1, 0),
    "row outside": lambda w: w[7],
    "equation without a column": lambda w: torch.einsum("bi,o->bo", X, w),
    "equation without a term": lambda w: torch.einsum("bi->b", X, w),
    "integers": lambda w: X.long() @ w.T,
    "dtype of a product by position": lambda w: torch.mm(Y, w, torch.float32),
    "number in place of a bias": lambda w: functional.linear(X, w, 1.0),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_refuses_is_refused_with_its_message(name):
    errors = []
    for weight in (PARAM, dense(PARAM, (6, 4))):
        with pytest.raises((RuntimeError, IndexError, TypeError, AssertionError)) as info:
            call(Uses(REFUSED[name], (6, 4)), {"weight": weight})
        errors.append(str(info.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("path", ["merged", "dense", "factored"])
def test_a_complex_input_gives_the_gradients_of_the_complex_weight(path):
    x = torch.complex(normal(1, 5, 4), normal(2, 5, 4))

    def loss_fn(factors, multiply):
        return (multiply(PARAM._replace(factors=factors)) * normal(3, 5, 6)).abs().square().sum()

    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(action="error"):  # of an imaginary part that is lost
            got = torch.func.grad(loss_fn)(PARAM.factors, lambda param: linear(x, param, path=path))
    finally:
        torch.set_warn_always(False)
    wanted = torch.func.grad(loss_fn)(PARAM.factors, lambda param: x @ dense(param, (6, 4)).to(x.dtype).mT)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("x", [X, torch.complex(X, X)])
def test_autocast_does_not_round_what_torch_does_not(x):
    with torch.autocast("cpu"):
        got = linear(x, PARAM)
    assert_same(got, linear(x, PARAM))


def test_autocast_does_not_round_bags_and_bilinear_forms():
    param = low_rank(Shape(6, 4, 2), (5,), seed=4)
    uses = [
        (PARAM, (6, 4), lambda w: functional.embedding_bag(IDS, w, mode="sum", per_sample_weights=torch.ones(2, 2))),
        (param, (5, 6, 4), lambda w: functional.bilinear(Y, X, w, torch.ones(5))),
    ]
    for weight, shape, use in uses:
        with torch.autocast("cpu"):
            got = call(Uses(use, shape), {"weight": weight})
        assert_same(got, call(Uses(use, shape), {"weight": weight}))


@pytest.mark.parametrize("offsets", [(), (OFFSETS,)])
def test_a_grouped_product_takes_offsets_by_position_or_none(offsets):
    weight = low_rank(Shape(16, 8, 2), (3,), seed=5)._replace(base=normal(6, 3, 16, 8))
    x = normal(7, 6, 16) if offsets else normal(7, 3, 2, 16)
    model = Uses(lambda w: torch._grouped_mm(x.bfloat16(), w.bfloat16(), *offsets), (3, 16, 8))
    got, wanted = (call(model, {"weight": param}) for param in (weight, dense(weight, (3, 16, 8))))
    torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.2)


def test_what_takes_the_dtype_of_a_weight_takes_that_of_the_module():
    """Factors are in float32 by default, and a module in bfloat16 reads a weight in bfloat16."""
    seen = []

    class Reads(nn.Linear):
        def forward(self, x):
            w = self.weight
            seen.extend([w, torch.einsum("oi->io", w), x.type_as(w), x.to(w), torch.zeros_like(w), w.new_zeros(2)])
            return super().forward(x.type_as(w))

    model = Reads(4, 6).bfloat16()
    call(model, init(model, rank=2, seed=0, targets=["weight"]), X.float())
    assert [tensor.dtype for tensor in seen] == [torch.bfloat16] * 6
