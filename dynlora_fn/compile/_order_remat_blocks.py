"""Graph pass that recomputes the blocks of `remat` one after the other.

`remat` replaces each input of a recomputed block by ``late(input, grad)``, where `grad` is the gradient of the block's
output. Waiting for that gradient is not enough, because nothing in the graph waits for the gradients of the next
block's parameters. A compiler would compute these later, and keep the activations of the next block alive while it
recomputes this block.
"""

from collections import defaultdict
from operator import getitem

import torch
from torch import Tensor
from torch.fx import Graph, Node

from dynlora_fn.compile._graph import insert_wait, is_unfused

_LATE = torch.ops.dynlora_fn.late.default


def order_remat_blocks(graph: Graph) -> None:
    """Make each block wait for the gradient of its output and for the next blocks.

    The recomputation waits for every result that depends on the recomputation of the next blocks.
    """
    inputs: dict[Node, list[Node]] = defaultdict(list)  # the marked inputs of each block, by its output's gradient
    for node in graph.nodes:
        if node.target is _LATE:
            inputs[node.all_input_nodes[1]].append(node)
    recomputed = _recomputed_blocks(graph, list(inputs))
    dependents: dict[int, list[Node]] = defaultdict(list)
    for node, blocks in recomputed.items():
        dependents[blocks].append(node)
    for grad, marked in inputs.items():
        awaited = [grad]
        if blocks := recomputed[grad]:
            awaited += _last_results(dependents[blocks], grad)
            _move_before(graph, marked[0], awaited)
        for node in marked:
            _replace_mark(graph, node, awaited)


def _recomputed_blocks(graph: Graph, grads: list[Node]) -> dict[Node, int]:
    """Return the recomputed blocks that each node depends on, as one bit per block."""
    bits = {grad: 1 << index for index, grad in enumerate(grads)}
    blocks: dict[Node, int] = {}
    for node in graph.nodes:
        blocks[node] = bits[node.all_input_nodes[1]] if node.target is _LATE else 0
        for source in node.all_input_nodes:
            blocks[node] |= blocks[source]
    return blocks


def _last_results(nodes: list[Node], grad: Node) -> list[Node]:
    """Return the results that neither `grad` nor another of the results depends on."""
    among = set(nodes)
    awaited, last = _with_inputs([grad], among), []
    for node in reversed(nodes):
        if node not in awaited and _is_result(node):
            last.append(node)
            awaited |= _with_inputs([node], among - awaited)
    return last


def _with_inputs(nodes: list[Node], among: set[Node]) -> set[Node]:
    """Return the nodes, and the nodes of `among` that they depend on."""
    found: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += [source for source in node.all_input_nodes if source in among]
    return found


def _is_result(node: Node) -> bool:
    is_stored = node.target is getitem or (is_unfused(node) and node.target is not _LATE)
    return is_stored and isinstance(node.meta.get("val"), Tensor)


def _move_before(graph: Graph, reader: Node, nodes: list[Node]) -> None:
    """Move the nodes, and the nodes that they depend on, to before the reader.

    In a graph, an input must precede its readers.
    """
    order = list(graph.nodes)
    following = set(order[order.index(reader) :])
    moved = _with_inputs([node for node in nodes if node in following], following)
    for node in order:
        if node in moved:
            reader.prepend(node)


def _replace_mark(graph: Graph, node: Node, awaited: list[Node]) -> None:
    with graph.inserting_after(node):
        view = insert_wait(graph, node.all_input_nodes[0], awaited)
    node.replace_all_uses_with(view)
    graph.erase_node(node)
