"""Graph passes keep the values of a step, and match the patterns that they rewrite."""

from collections import Counter

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from dynlora_fn import LowRank, compile_step, linear, unstack
from dynlora_fn.bases import quantize
from dynlora_fn.compile._passes import PASSES, GraphPasses
from dynlora_fn.nn._view import View, transposed
from dynlora_fn.testing import Shape, assert_same, low_rank, normal

STACK = low_rank(Shape(6, 8, 2), (3,), base_dtype=torch.float32, factor_dtype=torch.float32)
X = normal(1, 5, 8, dtype=torch.float32)


def rewritten(function, *args):
    """Return the results of the traced graph, the graph after the passes, and the count of each operation in it."""
    table = select_decomp_table()
    graph = make_fx(function, decomposition_table=table, tracing_mode="fake", _allow_non_fake_inputs=True)(*args)
    wanted = graph(*args)
    GraphPasses()(graph.graph)
    graph.graph.lint()
    graph.recompile()
    return wanted, graph, Counter(node.target for node in graph.graph.nodes)


def gradients(dtype: torch.dtype, stack: LowRank = STACK, path: str = "merged", is_transposed: bool = False):
    """Return the gradients of a chain of stacked low-rank weights and a stacked vector."""

    def loss(factors, shifts, x):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            members = unstack({"*": stack._replace(factors=factors)}).values()
            for param, shift in zip(members, shifts.unbind(0), strict=True):
                param = transposed(View("w", (param,))).parts[0] if is_transposed else param  # noqa: PLW2901
                x = linear(x, param, path=path).float()
                x = torch.nn.functional.pad(x, (0, shift.shape[0] - x.shape[-1])).tanh() * shift
        return x.square().sum()

    return torch.func.grad(loss, argnums=(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_stay_bit_for_bit(dtype):
    args = STACK.factors, normal(2, 3, 8, dtype=torch.float32), X
    wanted, after, count = rewritten(gradients(dtype), *args)
    assert_same(after(*args), wanted)
    ops = torch.ops.dynlora_fn
    # One merged weight forward and one backward for each layer; side b, side a and the vectors stacked in one each.
    assert count[ops.times_merged.default] == 6
    assert count[torch.ops.aten.addmm.default] == 0
    assert count[ops.stack.default] == 3
    assert count[ops.separate.default] >= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["factored", "merged", "dense"])
@pytest.mark.parametrize("is_transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("kind", ["int8", "float8", "nf4", "bfloat16"])
def test_a_base_is_dequantized_within_its_products(kind, path, dtype, is_transposed):
    """No product uses a dense base without its factors, and a merged base is absorbed completely."""
    stack = low_rank(Shape(16, 16, 2), (3,), base_dtype=torch.float32, factor_dtype=torch.float32)
    stack = quantize(stack, kind)
    args = stack.factors, normal(2, 3, 16, dtype=torch.float32), normal(1, 5, 16, dtype=torch.float32)
    wanted, after, count = rewritten(gradients(dtype, stack, path, is_transposed), *args)
    assert_same(after(*args), wanted)
    ops = torch.ops.dynlora_fn
    # Forward and backward for each layer; the gradient of the first input is used only with a merged weight.
    products = 6 if path == "merged" and (kind == "bfloat16" or not is_transposed) else 5
    is_used_as_it_is = (kind, path, dtype) == ("bfloat16", "factored", torch.bfloat16)
    assert count[ops.times_codes.default] == (0 if is_used_as_it_is else products)
    assert count[ops.dequantize.default] == 0
    assert count[torch.ops.aten.addmm.default] == 0


@pytest.mark.parametrize("path", ["factored", "merged", "dense"])
def test_a_bias_is_added_where_the_base_is_dequantized(path):
    param = quantize(low_rank(Shape(16, 8, 2), (), base_dtype=torch.float32, factor_dtype=torch.float32), "int8")
    bias = normal(3, 16, dtype=torch.float32)
    wanted, after, count = rewritten(lambda x: linear(x, param, bias, path=path), X)
    assert_same(after(X), wanted)
    assert count[torch.ops.dynlora_fn.times_codes.default] == 1
    assert count[torch.ops.dynlora_fn.dequantize.default] == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.ops.dynlora_fn.dequantize([x], "plain", torch.float64),
        lambda x: x.double() @ torch.ops.dynlora_fn.dequantize([x], "plain", torch.float64).T,
        lambda x: [w @ w.T for w in [torch.ops.dynlora_fn.dequantize([x], "plain", torch.float64)]],
        lambda x: [x.double() @ w.T @ w for w in [torch.ops.dynlora_fn.dequantize([x], "plain", torch.float64)]],
        lambda x: [x.double().T @ w + w.sum() for w in [torch.ops.dynlora_fn.dequantize([x], "plain", torch.float64)]],
        lambda x: [w.T @ x.double() for w in [torch.ops.dynlora_fn.dequantize([x], "plain", torch.float64)]],
        lambda x: torch.stack([row.sin() for row in x]),
        lambda x: torch.stack([row / 3 for row in x.view(5, 2, 4)]),
        lambda x: torch.stack([row.T / 3 for row in x.view(5, 2, 4)]),
        lambda x: torch.stack([row.T / (n + 1) for n, row in enumerate(x.view(5, 2, 4))]),
        lambda x: torch.stack([row.T if n else row.T.contiguous() for n, row in enumerate(x.view(5, 2, 4))]),
        lambda x: torch.stack(list(x.T), dim=1),
        lambda x: torch.stack([x[0], x[0], x[1]]),
        lambda x: torch.stack([(x[0] / 2)] * 2) + (x[0] / 2),
        lambda x: torch.cat([x, x]).view(2, 5, 8).sin(),
        lambda x: torch.cat([x, x]).view(2, 40),
        lambda x: (torch.cat([x, x]).view(2, 5, 8), torch.cat([x, x])),
        lambda x: torch.cat([torch.addmm(x, x[:, :5], x, alpha=0.5), x[:, :5]], 1),
        lambda x: torch.cat([torch.addmm(x, x[:, :5], x, alpha=0.5), x], 1),
        lambda x: torch.cat([torch.addmm(x, x[:, :5], x, alpha=0.5), x[:, :5], x], 1),
        lambda x: torch.cat([torch.addmm(x, x[:, :5], x, beta=2), x[:, :5]], 1),
        lambda x: torch.addmm(x[0], x[:, :5], x),
        lambda x: x @ torch.addmm(x, x[:, :5], x, alpha=0.5).T,
        lambda x: x.T @ torch.addmm(x, x[:, :5], x, alpha=0.5),
        lambda x: torch.addmm(x, x[:, :5], x, alpha=0.5) @ x.T,
        lambda x: torch.addmm(x[:, 0], x, torch.addmm(x, x[:, :5], x, alpha=0.5).T),
        lambda x: torch.addmm(x[:, 0], x, torch.addmm(x, x[:, :5], x, alpha=0.5).T, alpha=3),
        lambda x: x.T @ torch.cat([torch.addmm(x, x[:, :5], x, alpha=0.5), x[:, :5]], 1),
        lambda x: x @ torch.cat([torch.addmm(x, x[:, :5], x), x[:, :5]], 1)[:, :8].T,
        lambda x: x.double() @ torch.addmm(x, x[:, :5], x).double().T,
        lambda x: [x @ weight.T @ weight for weight in [torch.addmm(x, x[:, :5], x)]],
        lambda x: [weight @ weight.T for weight in [torch.addmm(x, x[:, :5], x)]],
        lambda x: torch.cat([torch.addmm(x[0], x[:, :5], x).double(), x[:, :5].double()], 1),
    ],
)
def test_look_alikes_keep_their_values(function):
    wanted, after, _ = rewritten(function, X)
    assert_same(after(X), wanted)


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_that_is_skipped_does_not_run(name, monkeypatch):
    called = []
    for each in PASSES:
        monkeypatch.setitem(PASSES, each, lambda graph, each=each: called.append(each))
    GraphPasses(skip=[name])(torch.fx.Graph())
    assert called == [each for each in PASSES if each != name]
    assert GraphPasses(skip=[name]).uuid() != GraphPasses().uuid()


def test_an_unknown_pass_cannot_be_skipped():
    with pytest.raises(ValueError, match=r"`skip` names unknown graph passes \['fuse'\]; choose from \['order_remat"):
        GraphPasses(skip=["fuse"])


@pytest.mark.slow
@pytest.mark.inductor
def test_a_mode_and_options_of_the_caller_hold():
    step = compile_step(lambda state: (state + 1, None), donate=False, options={"realize_reads_threshold": 3})
    assert_same(step(torch.zeros(3)).state, torch.ones(3))
    step = compile_step(lambda state: (state + 1, None), donate=False, mode="reduce-overhead")
    assert_same(step(torch.zeros(3)).state, torch.ones(3))
