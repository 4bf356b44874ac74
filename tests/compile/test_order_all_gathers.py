"""No two gathered weights of a step's graph are alive at once, in any order of execution."""

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx

from dynlora_fn import linear, unstack
from dynlora_fn._core._types import Sharding
from dynlora_fn.bases import quantize
from dynlora_fn.bases._base import as_base
from dynlora_fn.bases._sharded import Sharded
from dynlora_fn.compile._passes import GraphPasses
from dynlora_fn.testing import Shape, low_rank, normal
from tests.support.graphs import waits_for

X = normal(1, 64, 8, dtype=torch.float32)
GATHER = torch.ops._c10d_functional.all_gather_into_tensor.default
PRODUCTS = (torch.ops.dynlora_fn.times_codes.default, torch.ops.dynlora_fn.times_merged.default)


def graph_of_a_step(base: str | None, rows: int) -> Graph:
    """Trace two layers of three branches each (query, key, value) on the last of four processes."""
    stack = low_rank(Shape(8, 8, 2), (6,), base_dtype=torch.float32, factor_dtype=torch.float32)
    stack = stack if base is None else quantize(stack, base)
    # Tracing needs no process group.
    sharding = Sharding("none", 4, 3, rows)
    base = Sharded(
        as_base(stack.base).map_rows(lambda leaf, shard: leaf[..., shard.local_rows, :].clone(), sharding), sharding
    )
    factors = stack.factors._replace(b=stack.factors.b[..., :rows, :])

    def loss(factors, base, x):
        members = list(unstack({"*": stack._replace(factors=factors, base=base)}).values())
        for at in (0, 3):
            query, key, value = (linear(x, member, path="merged") for member in members[at : at + 3])
            x = (query @ key.T).tanh() @ value
            x = torch.nn.functional.pad(x, (0, 8 - rows))
        return x.square().sum()

    traced = make_fx(
        torch.func.grad(loss),
        decomposition_table=select_decomp_table(),
        tracing_mode="fake",
        _allow_non_fake_inputs=True,
    )
    return traced(factors, base, X).graph


@pytest.mark.parametrize("rows", [8, 7])  # of seven rows, the last process has one
@pytest.mark.parametrize("base", [None, "int8"])
def test_each_product_comes_between_its_own_gather_and_the_next(base, rows):
    graph = graph_of_a_step(base, rows)
    before = [node for node in graph.nodes if node.target is GATHER]
    assert not any(waits_for(node) & set(before) for node in before)
    GraphPasses()(graph)
    graph.lint()
    users = [node for node in graph.nodes if node.target in PRODUCTS]
    gathered = [{node for node in waits_for(user) if node.target is GATHER} for user in users]
    assert len(users) == 12
    assert len(gathered[-1]) == len(before) == (12 if base is None else 24)
    for index, (user, awaited) in enumerate(zip(users, gathered, strict=True)):
        later = gathered[-1] - awaited
        assert len(awaited) == len(before) // 12 * (index + 1)  # only this product's gather and the earlier ones
        assert all(user in waits_for(node) for node in later)


def test_what_is_sent_is_padded_then():
    """Padding everything at the start would copy all shards of the process."""
    graph = graph_of_a_step(None, 7)
    GraphPasses()(graph)
    first, *later = [node.args[0] for node in graph.nodes if node.target is GATHER]
    assert len(later) == 11
    for node in (first, *later):
        assert node.target is torch.ops.aten.constant_pad_nd.default
    assert not any(node.target in PRODUCTS for node in waits_for(first))
    assert all(any(dependency.target in PRODUCTS for dependency in waits_for(node)) for node in later)
