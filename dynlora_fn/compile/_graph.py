"""What the nodes of a graph are to a compiler that fuses."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from dynlora_fn._core._torch import tree_leaves

aten = torch.ops.aten

# Pointwise to a compiler that fuses, though not marked so: gathers, copies and what fills.
_FUSED = {aten.embedding.default, aten.cat.default, aten.stack.default, aten.full.default, aten.clone.default}
_FUSED |= {aten.scalar_tensor.default, aten.zeros_like.default, aten.ones_like.default, aten.constant_pad_nd.default}
_FUSED |= {aten.empty.memory_format, aten.gather.default, aten.index.Tensor, aten.index_select.default}
_REDUCTIONS = {aten.sum, aten.mean, aten.amax, aten.amin, aten.any, aten.prod, aten._log_softmax, aten._softmax}


def is_view(node: Node) -> bool:
    if node.op != "call_function":
        return False
    schema = getattr(node.target, "_schema", None)
    is_alias = schema is not None and any(result.alias_info for result in schema.returns)
    return is_alias or node.target in (aten.reshape.default, aten._unsafe_view.default) or schema is None


def is_fused(node: Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return node.op == "call_function" and (torch.Tag.pointwise in tags or node.target in _FUSED)


def is_reduction(node: Node) -> bool:
    return getattr(node.target, "overloadpacket", None) in _REDUCTIONS


def bytes_of(value: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def is_view_of(user: Node, node: Node) -> bool:
    """And not of another that is to come after the node."""
    return is_view(user) and user.all_input_nodes[0] is node


def without_views(node: Node) -> Node:
    """What the node is a view of."""
    return without_views(node.all_input_nodes[0]) if is_view(node) else node


def depths(nodes: list[Node]) -> dict[Node, int]:
    """How many results must have been formed, one from the other, before each node's. The order in which the graph is
    written does not matter: it need not be the one in which it will run."""
    depth: dict[Node, int] = {}
    for node in nodes:
        own = 0 if node.op != "call_function" or is_view(node) or is_fused(node) else 1
        depth[node] = own + max((depth[source] for source in node.all_input_nodes), default=0)
    return depth


def uses(nodes: list[Node], depth: dict[Node, int]) -> dict[Node, list[int]]:
    """The depths at which each node is read, its own if it is not: by way of views too, and by a pointwise operation
    where that is first used itself."""
    found: dict[Node, list[int]] = {}
    for node in reversed(nodes):
        reads = [
            found[user] if is_view_of(user, node) else [min(found[user]) if is_fused(user) else depth[user]]
            for user in node.users
        ]
        found[node] = [read for one in reads for read in one] or [depth[node]]
    return found
