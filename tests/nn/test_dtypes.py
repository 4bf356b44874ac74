"""A module reads a low-rank weight in the dtype of its parameter, so that results fit its other layers."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

import dynlora_fn as dl
from dynlora_fn.testing import normal

IDS = torch.tensor([[0, 3, 3], [5, 1, 0]])
READS = {
    "embedding": lambda w: functional.embedding(IDS, w),
    "embedding with padding": lambda w: functional.embedding(IDS, w, padding_idx=3),
    "embedding_bag": lambda w: functional.embedding_bag(IDS, w),
    "rows": lambda w: w[IDS],
    "row": lambda w: w[2],
    "column": lambda w: w[:, 1],
    "no rule": lambda w: w.abs(),
}


class Reads(nn.Module):
    """Reads a weight before a layer that takes only its dtype."""

    def __init__(self, read, dtype: torch.dtype, columns: int) -> None:
        super().__init__()
        self.read = read
        self.weight = nn.Parameter(normal(0, 6, 4, dtype=dtype))
        self.norm, self.head = nn.LayerNorm(columns, dtype=dtype), nn.Linear(columns, 3, dtype=dtype)

    def forward(self) -> Tensor:
        return self.head(self.norm(self.read(self.weight)))


def reader(name: str, dtype: torch.dtype) -> Reads:
    torch.manual_seed(0)
    return Reads(READS[name], dtype, 6 if name == "column" else 4)


@pytest.mark.filterwarnings("ignore:low-rank weight")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", READS)
def test_a_model_runs_in_its_dtype_with_factors_in_float32(name, dtype):
    model = reader(name, dtype)
    params = dl.init(model, rank=2, alpha=3, seed=0, targets=["weight"])
    trainable, frozen = dl.partition(params)

    def output(trainable):
        return dl.call(model, dl.combine(trainable, frozen))

    got, wanted = output(trainable), functional_call(model, dl.state_dict(model, params))
    assert got.dtype == wanted.dtype == dtype
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(got, wanted, rtol=0, atol=16 * eps * wanted.abs().max().item())
    grads = torch.func.grad(lambda tree: output(tree).float().square().sum())(trainable)
    assert grads["weight"].b.dtype == torch.float32
    assert grads["weight"].b.any()


@pytest.mark.parametrize("base", ["bfloat16", "int8"])
def test_rows_are_in_the_dtype_of_the_model_with_bases_in_low_precision(base):
    for dtype in (torch.float32, torch.bfloat16):
        model = reader("embedding", dtype)
        params = dl.init(model, rank=2, seed=0, targets=["weight"], base=base)
        assert dl.call(model, params).dtype == dtype


def test_a_cast_weight_is_read_in_the_dtype_that_it_is_cast_to():
    model = reader("embedding", torch.bfloat16)
    model.forward = lambda: (model.weight.dtype, functional.embedding(IDS, model.weight.float()))
    dtype, rows = dl.call(model, dl.init(model, rank=2, seed=0, targets=["weight"]))
    assert (dtype, rows.dtype) == (torch.bfloat16, torch.float32)


def test_rows_of_factors_in_half_precision_stay_in_it():
    model = reader("embedding", torch.float32)
    model.forward = lambda: model.read(model.weight)
    params = dl.init(model, rank=2, seed=0, targets=["weight"], dtype=torch.bfloat16)
    assert dl.call(model, params).dtype == torch.bfloat16
