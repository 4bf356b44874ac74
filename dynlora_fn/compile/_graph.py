"""How a fusing compiler treats the nodes of a graph, and how to make a node wait.

Graph passes share these functions.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

import dynlora_fn.compile._ops  # noqa: F401 (registers the operations)
from dynlora_fn._core._torch import tree_leaves

aten = torch.ops.aten
_AFTER = torch.ops.dynlora_fn.after.default

# Inductor fuses these like pointwise operations, though torch does not tag them so: gathers, copies, fills.
_FUSED = {aten.embedding.default, aten.cat.default, aten.stack.default, aten.full.default, aten.clone.default}
_FUSED |= {aten.scalar_tensor.default, aten.zeros_like.default, aten.ones_like.default, aten.constant_pad_nd.default}
_FUSED |= {aten.empty.memory_format, aten.gather.default, aten.index.Tensor, aten.index_select.default}
_REDUCTIONS = {aten.sum, aten.mean, aten.amax, aten.amin, aten.any, aten.prod, aten._log_softmax, aten._softmax}


# --- kinds of nodes


def is_operation(node: Node) -> bool:
    return node.op == "call_function"


def is_view(node: Node) -> bool:
    """Return whether the node shares the memory of its first input.

    This is the case for views, reshapes and `getitem`.
    """
    if not is_operation(node):
        return False
    schema = getattr(node.target, "_schema", None)
    is_alias = schema is not None and any(result.alias_info for result in schema.returns)
    return is_alias or node.target in (aten.reshape.default, aten._unsafe_view.default) or schema is None


def is_fused(node: Node) -> bool:
    """Return whether the compiler can compute the node inside kernels that read it."""
    tags = getattr(node.target, "tags", ())
    return is_operation(node) and (torch.Tag.pointwise in tags or node.target in _FUSED)


def is_unfused(node: Node) -> bool:
    """Return whether the result of the node is always stored in memory.

    This is the case for products and reductions.
    """
    return is_operation(node) and not is_view(node) and not is_fused(node)


def is_reduction(node: Node) -> bool:
    return getattr(node.target, "overloadpacket", None) in _REDUCTIONS


def is_pure(node: Node) -> bool:
    """Return whether the operation is free of random numbers and in-place writes."""
    target: Any = node.target
    return not (torch.Tag.nondeterministic_seeded in target.tags or target._schema.is_mutable)


def without_views(node: Node) -> Node:
    """Return the node that a chain of views starts from, or the node if it is no view."""
    return without_views(node.all_input_nodes[0]) if is_view(node) else node


# --- sizes and times


def bytes_of(value: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def node_bytes(node: Node) -> int:
    return bytes_of(node.meta.get("val"))


def depths(nodes: list[Node]) -> dict[Node, int]:
    """Return the depth of each node.

    The depth is the largest number of unfused operations on a path that ends with the node. Passes use it as a time,
    because the order of the nodes in the graph need not be the order in which they run.
    """
    depth: dict[Node, int] = {}
    for node in nodes:
        depth[node] = is_unfused(node) + max((depth[source] for source in node.all_input_nodes), default=0)
    return depth


def read_depths(nodes: list[Node], depth: dict[Node, int]) -> dict[Node, list[int]]:
    """Return the depths at which each node is read, or its depth if nothing reads it.

    A view is not a read itself; its readers are. A fused operation reads its inputs when it is first read.
    """
    found: dict[Node, list[int]] = {}
    for node in reversed(nodes):
        reads: list[int] = []
        for user in node.users:
            if is_view(user) and user.all_input_nodes[0] is node:  # not a view of another node that waits for this one
                reads += found[user]
            else:
                reads.append(min(found[user]) if is_fused(user) else depth[user])
        found[node] = reads or [depth[node]]
    return found


# --- changes of the graph


def insert_wait(graph: Graph, node: Node, others: Iterable[Node]) -> Node:
    """Insert a view of `node` that is read only after `others` are computed."""
    view = graph.call_function(_AFTER, (node, list(others)))
    view.meta["val"] = node.meta["val"]
    return view


def replace_other_uses(node: Node, new: Node) -> None:
    """Let all users of `node` except `new` read `new` instead."""
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
