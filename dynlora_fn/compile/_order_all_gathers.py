"""Graph pass that all-gathers each sharded base right before its product.

An all-gather depends only on arguments of the step. Without this pass a compiler starts every all-gather first, and
all gathered weights are alive at once.
"""

from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

from dynlora_fn._core._torch import C10D
from dynlora_fn.compile._graph import insert_wait, is_fused, is_operation, is_view

_AFTER = torch.ops.dynlora_fn.after.default
_ALL_GATHER = C10D.all_gather_into_tensor.default
_WAIT_TENSOR = C10D.wait_tensor.default


def order_all_gathers(graph: Graph) -> None:
    """Make each all-gather wait for the last read of the weights gathered before it."""
    place = {node: index for index, node in enumerate(graph.nodes)}
    readers = {gather: list(_readers(gather)) for gather in place if gather.target is _ALL_GATHER}
    first_reader = {gather: min(nodes, key=place.__getitem__) for gather, nodes in readers.items() if nodes}
    for gather in sorted(first_reader, key=lambda gather: place[first_reader[gather]]):
        reader = first_reader[gather]
        earlier = [node for other in first_reader for node in readers[other] if place[node] < place[reader]]
        if earlier:
            _move_before(reader, gather)
            _delay(graph, gather, max(earlier, key=place.__getitem__))


def _readers(node: Node) -> Iterator[Node]:
    """Yield the operations that read the gathered weight, also through views."""
    for user in node.users:
        if _passes_on(user, node):
            yield from _readers(user)
        elif is_operation(user):
            yield user


def _passes_on(user: Node, node: Node) -> bool:
    only_waits = user.target is _AFTER and user.args[0] is not node
    return not only_waits and (user.target is _WAIT_TENSOR or is_view(user) or is_fused(user))


def _move_before(reader: Node, node: Node) -> None:
    """Move the node, and the nodes that pass its result on, right before the reader."""
    reader.prepend(node)
    for user in node.users:
        if _passes_on(user, node):
            _move_before(reader, user)


def _delay(graph: Graph, gather: Node, other: Node) -> None:
    """Make the all-gather, and the padding of its shard, wait for the other node.

    Otherwise a compiler would pad the shards of all all-gathers at once, and so copy all of them.
    """
    preparation = _preparation(gather)
    shard = preparation[0].all_input_nodes[0] if preparation else gather.all_input_nodes[0]
    with graph.inserting_before(gather):
        new = insert_wait(graph, shard, [other])
        for node in preparation:
            inputs = {node.all_input_nodes[0]: new}
            new = graph.node_copy(node, inputs.__getitem__)
    gather.replace_input_with(gather.all_input_nodes[0], new)


def _preparation(gather: Node) -> list[Node]:
    """Return the views and fused operations between a shard and its all-gather.

    The first of them is a fused operation.
    """
    nodes: list[Node] = []
    node = gather.all_input_nodes[0]
    while len(node.all_input_nodes) == 1 and (is_view(node) or is_fused(node)):
        nodes.insert(0, node)
        node = node.all_input_nodes[0]
    while nodes and not is_fused(nodes[0]):
        nodes.pop(0)
    return nodes
