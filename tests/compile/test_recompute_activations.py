"""Recomputing activations in a step's graph keeps the values and saves fewer of them."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import dropout, rms_norm, silu

from dynlora_fn import peak_memory
from dynlora_fn.compile._passes import PASSES
from dynlora_fn.compile._recompute_activations import recompute_activations
from dynlora_fn.testing import assert_same, normal

aten = torch.ops.aten
X = normal(1, 32, 16, dtype=torch.float32)
WEIGHTS = normal(2, 6, 16, 16, dtype=torch.float32)


def graph_of(function, *args):
    return make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="fake")(*args)


def count(graph, target) -> int:
    return sum(node.target is target for node in graph.graph.nodes)


def loss(weights, x):
    """Blocks of a norm, a gate and a residual; only the products must be saved."""
    for weight in weights.unbind():
        inner = rms_norm(x, [16])
        x = x + (silu(inner @ weight) * (inner @ weight.T)) @ weight
    return x.square().sum()


def test_values_stay_bit_for_bit():
    before = graph_of(torch.func.grad_and_value(loss, argnums=(0, 1)), WEIGHTS, X)
    after = graph_of(torch.func.grad_and_value(loss, argnums=(0, 1)), WEIGHTS, X)
    recompute_activations(after.graph)
    after.graph.lint()
    after.recompile()
    assert len(after.graph.nodes) > len(before.graph.nodes)
    assert count(after, aten.mm.default) == count(before, aten.mm.default)  # products are never formed twice
    assert_same(after(WEIGHTS, X), before(WEIGHTS, X))


def test_the_peak_falls(monkeypatch):
    args = torch.func.grad(loss), WEIGHTS, X
    low = peak_memory(*args).step
    monkeypatch.delitem(PASSES, "recompute_activations")
    # A norm and a gate in each block are not saved; those of one block, recomputed, are alive at the peak.
    assert low <= peak_memory(*args).step - len(WEIGHTS) * X.nbytes


def test_what_is_used_late_alone_is_formed_late():
    def step(x, weight):
        y = x
        for _ in range(6):
            y = (y @ weight).tanh()
        narrow = x @ weight[:, :8]  # only the order of the program prevents its computation at the start
        return y.T @ narrow

    before, after = graph_of(step, X, WEIGHTS[0]), graph_of(step, X, WEIGHTS[0])
    recompute_activations(after.graph)
    after.recompile()
    assert_same(after(X, WEIGHTS[0]), before(X, WEIGHTS[0]))
    last, narrow = [node for node in after.graph.nodes if node.target is aten.mm.default][-3:-1]
    assert narrow.args[0].target is torch.ops.dynlora_fn.after.default
    assert narrow.args[0].args[1] == [last]


def test_a_random_result_is_kept():
    def lossy(weights, x):
        for weight in weights.unbind():
            x = dropout(silu(x @ weight), 0.5, training=True).sin()
        return x.square().sum()

    before, after = (graph_of(torch.func.grad(lossy), WEIGHTS, X) for _ in range(2))
    recompute_activations(after.graph)
    after.recompile()
    randoms = [
        [
            node.target
            for node in graph.graph.nodes
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        ]
        for graph in (before, after)
    ]
    assert randoms[0] == randoms[1] != []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = before(WEIGHTS, X)
        torch.manual_seed(0)
        assert_same(after(WEIGHTS, X), expected)


def test_small_results_are_kept():
    """A kernel costs more than the memory of these values."""

    def function(x, small):
        shift = small.sin()
        for _ in range(6):
            x = (x + shift) @ x.T @ x
        return x + shift

    args = normal(1, 200, 16, dtype=torch.float32), normal(2, 16, dtype=torch.float32)
    graph = graph_of(function, *args)
    recompute_activations(graph.graph)
    assert count(graph, aten.sin.default) == 1


OPERATIONS = [
    lambda x, y: x + y,
    lambda x, y: x * y.sigmoid(),
    lambda x, y: x @ y,
    lambda x, y: x.T,
    lambda x, y: torch.cat([x[:, :8], y[:, 8:]], 1),
    lambda x, y: x.reshape(8, 32).sin().reshape(16, 16),
    lambda x, y: (x - x.mean(-1, keepdim=True)) * y.tanh(),
    lambda x, y: torch.cumsum(x, 0) - y,
    lambda x, y: x.softmax(-1) + y[0],
]


PROGRAMS = st.lists(st.tuples(st.integers(0, len(OPERATIONS) - 1), st.integers(0, 9), st.integers(0, 9)), max_size=30)


# A copy that is read by a node which is copied itself, later on.
CHAIN = [(6, 7, 9), (7, 2, 4), (6, 7, 1), (7, 5, 1), (6, 5, 5), (5, 9, 3)]
CHAIN += [(3, 3, 0), (7, 2, 8), (1, 4, 3), (4, 4, 6), (7, 3, 8), (6, 3, 1)]


@pytest.mark.slow
@given(PROGRAMS, st.booleans())
@example(CHAIN, True)
def test_any_program_keeps_its_values(program, is_gradient):
    def values_of(x, y):
        values = [x, y]
        for operation, first, second in program:
            values.append(OPERATIONS[operation](values[-1 - first % len(values)], values[-1 - second % len(values)]))
        return values[-5:]

    gradients = torch.func.grad(lambda *args: sum(value.square().sum() for value in values_of(*args)), argnums=(0, 1))
    function = gradients if is_gradient else values_of
    args = normal(3, 16, 16), normal(4, 16, 16)
    before, after = graph_of(function, *args), graph_of(function, *args)
    recompute_activations(after.graph)
    after.graph.lint()
    after.recompile()
    assert_same(after(*args), before(*args))
