"""Blocks of `remat` in a step's graph: each is computed again once the one after it is done."""

from collections import defaultdict
from operator import getitem

import torch
from torch import Tensor
from torch.fx import Graph, Node

import dynlora_fn.compile._ops  # noqa: F401 (registers the operations)
from dynlora_fn.compile._graph import is_fused, is_view

_AFTER = torch.ops.dynlora_fn.after.default
_LATE = torch.ops.dynlora_fn.late.default


def compute_in_turn(graph: Graph) -> None:
    """Lets each block wait for the gradient that reaches it, and for all that was to be made of the blocks after it.
    The gradients of those blocks' parameters nothing else waits for: left alone, a compiler forms them later, and keeps
    what they are made of while it computes the next block again."""
    given: dict[Node, list[Node]] = defaultdict(list)  # what each block takes, by the gradient that reaches it
    for node in graph.nodes:
        if node.target is _LATE:
            given[node.all_input_nodes[1]].append(node)
    made = _made_of_blocks(graph, list(given))
    members: dict[int, list[Node]] = defaultdict(list)
    for node, blocks in made.items():
        members[blocks].append(node)
    for grad, late in given.items():
        waiting = [grad]
        if blocks := made[grad]:
            waiting += _last(members[blocks], grad)
            _move(graph, waiting, late[0])
        for node in late:
            with graph.inserting_after(node):
                after = graph.call_function(_AFTER, (node.args[0], waiting))
            after.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(after)
            graph.erase_node(node)


def _made_of_blocks(graph: Graph, grads: list[Node]) -> dict[Node, int]:
    """Which blocks, by the gradients that reach them, each node has to be computed after: a bit for each."""
    bits = {grad: 1 << number for number, grad in enumerate(grads)}
    made: dict[Node, int] = {}
    for node in graph.nodes:
        made[node] = bits[node.all_input_nodes[1]] if node.target is _LATE else 0
        for source in node.all_input_nodes:
            made[node] |= made[source]
    return made


def _last(nodes: list[Node], grad: Node) -> list[Node]:
    """Of the results among them, those that no other waits for, nor `grad`."""
    own, waited, last = set(nodes), _sources([grad], set(nodes)), []
    for node in reversed(nodes):
        if node not in waited and _is_formed(node):
            last.append(node)
            waited |= _sources([node], own - waited)
    return last


def _sources(nodes: list[Node], among: set[Node]) -> set[Node]:
    """The nodes, and what they wait for among others."""
    found: set[Node] = set()
    left = list(nodes)
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += [source for source in node.all_input_nodes if source in among]
    return found


def _is_formed(node: Node) -> bool:
    is_own = not is_view(node) and not is_fused(node) and node.target is not _LATE
    return isinstance(node.meta.get("val"), Tensor) and (is_own or node.target is getitem)


def _move(graph: Graph, nodes: list[Node], late: Node) -> None:
    """The nodes, and what they are made of, to before another that waits for them: a graph is written in its order."""
    order = list(graph.nodes)
    following = set(order[order.index(late) :])
    moved = _sources([node for node in nodes if node in following], following)
    for node in order:
        if node in moved:
            late.prepend(node)
