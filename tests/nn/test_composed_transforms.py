"""Every product has the derivatives of the dense weight under every composition of transforms, three deep.

The full product of compositions, products, storages and variables takes hours. The suite runs a part that is spread
over it. With `--compositions` all pairs run, and all triples of some storages.
"""

import pytest
import torch
from torch.func import grad, jvp
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dynlora_fn import LowRank, call, linear, remat
from dynlora_fn.nn._remat import _Block
from dynlora_fn.testing import STORAGES, Storage, low_rank, normal
from tests.support.compositions import (
    DIRECTION,
    PATHS,
    POINT,
    RULES,
    SHAPE,
    composed,
    compositions,
    error_of,
    functions,
)
from tests.support.processes import in_processes

# Relative to the largest entry. Up to seven derivatives of sums of 64 products follow each other, in float64.
TOLERANCE = 1e-9
# A gradient by a base in bfloat16 is rounded to bfloat16, in both.
ROUNDED = 2.0**-5
PLAIN, INT8 = Storage("float64"), Storage("int8", "int8")


def check(names: tuple[str, ...], pair: tuple, tolerance: float = TOLERANCE) -> None:
    error = error_of(names, pair)
    assert error is None or error <= tolerance, f"{' of '.join(names)} is wrong by {error}"


def tolerance_of(storage: Storage) -> float:
    return ROUNDED if storage.kind in ("bfloat16", "float32") else TOLERANCE


def describe(storage: Storage) -> str:
    return f"{storage.kind}, {storage.residual}"


def fast(depth: int) -> list[tuple[str, ...]]:
    """Return compositions without `linearize`, which takes a second."""
    return [names for names in compositions(depth) if "linearize" not in names]


@pytest.mark.parametrize(
    ("path", "storage", "step"), [("merged", INT8, 2), ("factored", INT8, 5), ("recomputed", PLAIN, 5)]
)
def test_two_transforms(path, storage, step):
    pair = functions(path, storage, "all of them")
    for names in [*fast(1), *fast(2)[::step], ("linearize",)]:
        check(names, pair)


@pytest.mark.parametrize("path", PATHS)
def test_some_of_three_transforms(path):
    """Over all paths, every sixteenth composition of three transforms takes part."""
    index = list(PATHS).index(path)
    pair = functions(path, [PLAIN, INT8][index % 2], "all of them")
    for names in fast(3)[index :: 16 * len(PATHS)]:
        check(names, pair)


@pytest.mark.parametrize("storage", STORAGES, ids=describe)
def test_every_storage(storage):
    index = STORAGES.index(storage)
    path = ("merged", "transposed, factored", "stack, factored")[index % 3]
    waiting = 3 * (index % 2)
    pair = functions(path, storage, "all of them", waiting)
    for names in (("jvp", "grad"), ("grad", "jvp"), ("jvp", "jvp")):
        check(names, pair, tolerance_of(storage))


@pytest.mark.parametrize("name", RULES)
def test_every_rule(name):
    pair = functions(name, [PLAIN, INT8][list(RULES).index(name) % 2], "all of them")
    for names in (("jvp", "grad"), ("jvp", "jvp"), ("vmap", "grad")):
        check(names, pair)


@pytest.mark.compositions
@pytest.mark.parametrize("storage", STORAGES, ids=describe)
@pytest.mark.parametrize("path", PATHS)
def test_two_transforms_of_every_path_and_storage(path, storage):
    for by in ("input", "factors", "all of them"):
        pair = functions(path, storage, by)
        for names in (*compositions(1), *compositions(2)):
            check(names, pair, tolerance_of(storage))


@pytest.mark.compositions
@pytest.mark.parametrize("storage", [PLAIN, INT8, Storage("bfloat16"), Storage("nf4", "bfloat16")], ids=describe)
@pytest.mark.parametrize("path", PATHS)
def test_three_transforms_of_every_path(path, storage):
    pair = functions(path, storage, "input and factors")
    for names in compositions(3):
        check(names, pair)


@pytest.mark.compositions
@pytest.mark.parametrize("name", RULES)
def test_two_transforms_of_every_rule(name):
    for storage in (PLAIN, INT8, Storage("nf4", "bfloat16")):
        pair = functions(name, storage, "all of them")
        for names in (*compositions(1), *compositions(2)):
            check(names, pair)


@pytest.mark.parametrize(
    ("names", "path"),
    [
        (("jvp", "jvp"), "merged"),
        pytest.param(("jvp", "jvp"), "factored", marks=pytest.mark.slow),
        pytest.param(("jvp", "grad", "jvp"), "merged", marks=pytest.mark.slow),
        pytest.param(("jvp", "grad", "jvp"), "factored", marks=pytest.mark.slow),
    ],
)
def test_nested_forward_mode_in_one_graph(names, path):
    """In a separate process: after many other graphs, tracing a second tangent may fail inside of torch."""
    in_processes(1, _compare_in_one_graph, names, path)


def _compare_in_one_graph(names: tuple[str, ...], path: str) -> None:
    low_rank_function, dense_function = functions(path, INT8, "input and factors")
    compiled = torch.compile(composed(names, low_rank_function), fullgraph=True, backend="aot_eager")
    wanted = composed(names, dense_function)(POINT)
    torch.testing.assert_close(compiled(POINT), wanted, rtol=0, atol=TOLERANCE * wanted.abs().max().item())


@pytest.mark.parametrize("by", ["input", "factors", "input and factors"])
def test_gradients_of_gradients_through_a_checkpoint(by):
    """`torch.func` refuses checkpoints, so both transforms are those of autograd."""
    low_rank_function, dense_function = functions("merged", INT8, by)
    got = composed(("autograd", "autograd"), lambda v: checkpoint(low_rank_function, v, use_reentrant=False))(POINT)
    wanted = composed(("autograd", "autograd"), dense_function)(POINT)
    torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE * wanted.abs().max().item())


@pytest.mark.parametrize("name", ["recomputed", "merged"])
def test_a_pullback_is_differentiated_in_forward_mode(name):
    """The forward pass was recorded before any level of forward mode was active."""
    results = []
    for g in functions(name, INT8, "input and factors"):
        pull_back = torch.func.vjp(g, POINT)[1]
        results.append(jvp(lambda c, f=pull_back: jvp(f, (c.sin(),), (c,))[1], (DIRECTION,), (POINT,))[1][0])
    torch.testing.assert_close(*results, rtol=0, atol=TOLERANCE)


def test_torch_gradcheck_accepts_every_path():
    """With batched gradients and forward mode, which it takes by other means."""
    for path in ("factored", "merged", "dense", "recomputed"):
        g, _ = functions(path, INT8, "input and factors")
        assert torch.autograd.gradcheck(
            g, POINT.clone().requires_grad_(), check_forward_ad=True, check_batched_grad=True
        )
        assert torch.autograd.gradgradcheck(g, POINT.clone().requires_grad_(), check_fwd_over_rev=True)


class Remembers(torch.nn.Module):
    """Passes a tensor in or out by an attribute."""

    def __init__(self, by_input: bool):
        super().__init__()
        self.weight, self.by_input, self.penalty = torch.nn.Parameter(torch.ones(4, 32)), by_input, None

    def forward(self, x):
        y = functional.linear(x, self.weight)
        if self.by_input:
            return y * self.penalty
        self.penalty = y.square().sum()
        return y


@pytest.mark.parametrize("by_input", [True, False])
def test_an_attribute_through_which_a_gradient_passes_is_refused(by_input):
    block = Remembers(by_input)
    model = remat(torch.nn.Sequential(block), ["0"])
    params = {"0.weight": low_rank(SHAPE)}

    def value(v):
        if by_input:
            block.penalty = v.sum()
        return call(model, params, v.expand(2, 32)).sum()

    with pytest.raises(NotImplementedError, match="a Remembers whose attribute 'penalty' requires a gradient"):
        grad(value)(normal(0, 32))
    assert isinstance(model[0], _Block)


def test_levels_without_a_tangent_do_not_matter():
    """The outer level differentiates what the product does not see."""
    param: LowRank = low_rank(SHAPE, storage=INT8)
    x, t = normal(1, 2, 32), normal(2, 2, 32)

    def tangent(scale):
        return jvp(lambda x: linear(x, param, path="merged") * scale, (x,), (t,))[1]

    one = torch.ones((), dtype=torch.float64)
    got = jvp(tangent, (one,), (one,))[1]
    torch.testing.assert_close(got, linear(t, param, path="factored"), rtol=0, atol=1e-12)
