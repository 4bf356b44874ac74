"""Gathers of sharded bases in a step's graph: each for its own product, as the step was written."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

import dynlora_fn.compile._ops  # noqa: F401 (registers the operations)
from dynlora_fn._core._torch import C10D
from dynlora_fn.compile._graph import is_fused, is_view

_GATHER = C10D.all_gather_into_tensor.default
_AFTER = torch.ops.dynlora_fn.after.default
_WAIT = C10D.wait_tensor.default


def gather_in_turn(graph: Graph) -> None:
    """Lets each gather wait for the last use of what was gathered before. A gather depends on arguments alone: left
    alone, a compiler runs all of them at the start, with every gathered weight alive at once."""
    place = {node: number for number, node in enumerate(graph.nodes)}
    readers = {node: list(_readers(node)) for node in place if node.target is _GATHER}
    first = {node: min(found, key=place.__getitem__) for node, found in readers.items() if found}
    for node in sorted(first, key=lambda node: place[first[node]]):
        before = [one for other in first for one in readers[other] if place[one] < place[first[node]]]
        if before:
            _move(node, first[node])
            _wait(graph, node, max(before, key=place.__getitem__))


def _passes_on(user: Node, node: Node) -> bool:
    is_after = user.target is _AFTER and user.args[0] is not node  # what waits for it is not made of it
    return not is_after and (user.target is _WAIT or is_view(user) or is_fused(user))


def _readers(node: Node) -> Iterator[Node]:
    """What makes something of its own of it."""
    for user in node.users:
        if _passes_on(user, node):
            yield from _readers(user)
        elif user.op == "call_function":
            yield user


def _move(node: Node, reader: Node) -> None:
    """The node, and all that passes it on, to right before its first reader."""
    reader.prepend(node)
    for user in node.users:
        if _passes_on(user, node):
            _move(user, reader)


def _wait(graph: Graph, gather: Node, other: Node) -> None:
    """Padding of what is sent waits as well: done for all gathers at once, it would be a copy of all that is held."""
    chain = [gather]
    while _is_single(source := _source(chain[-1])):
        chain.append(source)
    while len(chain) > 1 and not is_fused(chain[-1]):
        chain.pop()
    with graph.inserting_before(gather):
        source = _source(chain[-1])
        new = graph.call_function(_AFTER, (source, [other]))
        new.meta["val"] = source.meta["val"]
        for node in reversed(chain[1:]):
            old, late = _source(node), new
            new = graph.node_copy(node, lambda one, old=old, late=late: late if one is old else one)  # type: ignore[misc]
    gather.replace_input_with(_source(gather), new)


def _is_single(node: Node) -> bool:
    return len(node.all_input_nodes) == 1 and (is_view(node) or is_fused(node))


def _source(node: Node) -> Any:
    return node.all_input_nodes[0]
