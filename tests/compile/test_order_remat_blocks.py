"""A block that is recomputed waits for the gradient that reaches it."""

import torch
from torch._inductor.fx_passes.post_grad import reorder_for_locality
from torch.fx.experimental.proxy_tensor import make_fx

from dynlora_fn import call, combine, remat
from dynlora_fn.compile._order_remat_blocks import order_remat_blocks
from dynlora_fn.testing import assert_same
from tests.support.blocks import X, make
from tests.support.graphs import waits_for


def test_a_block_waits_for_the_gradient_that_reaches_it():
    """Without this dependency in the graph, a compiler may recompute at once and keep the results."""
    model, trainable, frozen = make()
    again = remat(model, ["layers.*"])
    loss = torch.func.grad(lambda tree, x: call(again, combine(tree, frozen), x).square().mean())
    nodes = make_fx(loss)(trainable, X).graph.nodes
    waiting = [node for node in nodes if node.target is torch.ops.dynlora_fn.late.default]
    assert len(waiting) == 3
    assert [ancestors(node.args[0]) < ancestors(node.args[1]) for node in waiting] == [True] * 3


def test_a_block_waits_for_all_that_is_made_of_the_one_after_it():
    """This is true for any order of the graph, since gradients of parameters keep their inputs alive."""
    model, trainable, frozen = make()
    again = remat(model, ["layers.*"])
    loss = torch.func.grad(lambda tree, x: call(again, combine(tree, frozen), x).square().mean())
    traced = make_fx(loss)(trainable, X)
    wanted = traced(trainable, X)
    reorder_for_locality(traced.graph)  # as Inductor does: gradients move to where they are stacked
    late = [node for node in traced.graph.nodes if node.target is torch.ops.dynlora_fn.late.default]
    products = [node for node in traced.graph.nodes if node.target is torch.ops.aten.mm.default]
    block_products = [
        {node for node in products if marker in waits_for(node) and not later & waits_for(node)}
        for marker, later in zip(late, ({*late[1:]}, {late[2]}, set()), strict=True)
    ]
    assert all(not products <= waits_for(marker) for products, marker in zip(block_products, late[1:], strict=False))
    order_remat_blocks(traced.graph)
    traced.graph.lint()
    after = [node for node in traced.graph.nodes if node.target is torch.ops.dynlora_fn.after.default]
    assert len(after) == 3
    assert not any(products & waits_for(after[0]) for products in block_products)
    for products, marker in zip(block_products, after[1:], strict=False):
        assert len(products) > 2
        assert products <= waits_for(marker)
    traced.recompile()
    assert_same(traced(trainable, X), wanted)


def ancestors(node) -> set:
    return {node}.union(*(ancestors(source) for source in node.all_input_nodes))
