"""Graph pass that recomputes activations for the backward pass of a whole step.

For a model, `torch.compile` splits the graph into forward and backward pass, and then decides what to save. The graph
of a step contains both passes and is never split, so every activation that is read again would be saved.
"""

from collections.abc import Iterable
from operator import getitem
from typing import NamedTuple

from torch.fx import Graph, Node

from dynlora_fn.compile._graph import (
    depths,
    insert_wait,
    is_fused,
    is_operation,
    is_pure,
    is_unfused,
    is_view,
    node_bytes,
    read_depths,
    replace_other_uses,
    without_views,
)

_NEAR = 2  # unfused operations: a result that stays alive for so many more does not raise the peak
_LARGE = 100  # a result smaller than 1/100 of the largest result is not worth an additional kernel


def recompute_activations(graph: Graph) -> None:
    """Recompute pointwise results for late reads, so that less memory stays alive.

    Values do not change. A result is recomputed only from tensors that stay alive about as long anyway. Results that
    are only read late are computed late.
    """
    # Decide first, on the traced graph, since the changes below add nodes and readers without times.
    times = _measure(graph)
    sources = _find_recomputable(times)
    delayed = _find_delayable(times)
    # From here on, a delayed result counts as computed right before its first read, so no read of it is late.
    times = _delay_times(times, delayed)
    # Recompute before delaying, since a delayed result that reads a copy already waits.
    _recompute_late_reads(graph, times, sources, delayed)
    _delay_results(graph, times, delayed)
    # Store last, since this redirects all readers of a result, including the waits that the changes above insert.
    _store_once(graph, times, sources)


class _Times(NamedTuple):
    """The times at which results are computed and read, and the largest size."""

    place: dict[Node, int]  # position in the graph
    depth: dict[Node, int]  # see `depths`
    reads: dict[Node, list[int]]  # see `read_depths`
    largest: int  # bytes

    def is_late(self, user: Node, node: Node) -> bool:
        return self.depth[user] - self.depth[node] > _NEAR

    def is_large(self, node: Node) -> bool:
        return _LARGE * node_bytes(node) >= self.largest

    def latest(self, nodes: Iterable[Node]) -> Node:
        """Return the unfused operation that the nodes wait for last.

        For fused nodes and views, this is an operation that their inputs wait for.
        """
        node = max(nodes, key=lambda node: self.depth.get(node, 0))
        if is_unfused(node) or node.target is getitem or not node.all_input_nodes:
            return node
        return self.latest(node.all_input_nodes)


# --- decisions


def _measure(graph: Graph) -> _Times:
    nodes = list(graph.nodes)
    depth = depths(nodes)
    place = {node: index for index, node in enumerate(nodes)}
    return _Times(place, depth, read_depths(nodes, depth), max(map(node_bytes, nodes), default=0))


def _find_recomputable(times: _Times) -> dict[Node, set[Node]]:
    """Return the results that can be recomputed for late reads, with their sources.

    The sources of a result are the arguments and stored results from which it is recomputed.
    """
    sources: dict[Node, set[Node]] = {}
    last_read: dict[Node, int] = {}  # the last read of a copy of the node, also by copies computed from that copy
    for node in times.place:
        inputs, reads = node.all_input_nodes, times.reads[node]
        is_view_of_copy = is_view(node) and any(source in sources for source in inputs)
        if not is_view_of_copy and not (is_fused(node) and is_pure(node)):
            continue
        found = set().union(*(sources.get(source, {without_views(source)}) for source in inputs))
        last_of_inputs = max((last_read[source] for source in inputs if source in sources), default=0)
        first_late = min((read for read in reads if read - times.depth[node] > _NEAR), default=last_of_inputs)
        are_alive = all(max(reads) - max(times.reads[source]) <= _NEAR for source in found if is_operation(source))
        # Copies of the inputs must not outlive the first late read by much. In a chain of sums, such as a residual
        # stream, a copy of the first sum would otherwise bring back all later ones.
        if are_alive and last_of_inputs - first_late <= _NEAR:
            sources[node], last_read[node] = found, max(last_of_inputs, *reads)
    return sources


def _find_delayable(times: _Times) -> dict[Node, Node]:
    """Return the large results that are only read late, each with its first reader.

    Only results whose inputs are alive until that read are returned.
    """
    return {node: _first_reader(times, node) for node in times.place if _is_delayable(times, node)}


def _is_delayable(times: _Times, node: Node) -> bool:
    if not (is_unfused(node) and node.all_input_nodes and is_pure(node) and times.is_large(node)):
        return False
    first_read = min(times.reads[node])
    inputs = [without_views(source) for source in node.all_input_nodes]
    are_alive = all(max(times.reads[source]) >= first_read for source in inputs if is_operation(source))
    return are_alive and first_read - times.depth[node] > _NEAR


def _first_reader(times: _Times, node: Node) -> Node:
    """Return the first unfused operation that reads the node.

    If there is none, return the last view or fused operation on the way.
    """
    reader = min(node.users, key=lambda user: min(times.reads[user]) if is_view(user) else times.depth[user])
    return _first_reader(times, reader) if (is_view(reader) or is_fused(reader)) and reader.users else reader


def _delay_times(times: _Times, delayed: dict[Node, Node]) -> _Times:
    return times._replace(depth={**times.depth, **{node: min(times.reads[node]) - 1 for node in delayed}})


# --- changes


def _recompute_late_reads(
    graph: Graph, times: _Times, sources: dict[Node, set[Node]], delayed: dict[Node, Node]
) -> None:
    """Let late readers of a recomputable result read a copy.

    The copy is computed right before its first reader.
    """
    nodes = list(times.place)
    copies: dict[Node, Node] = {}

    def copy(node: Node, user: Node) -> Node:
        if node not in copies:
            if node in sources:
                copies[node] = graph.node_copy(node, lambda source: copy(source, user))
            elif node in times.place and is_operation(node) and times.is_large(node):
                # Without the wait, Inductor would fuse the copy with the first computation, and store its result.
                copies[node] = insert_wait(graph, node, [_awaited(times, delayed, user)])
                for other in nodes[times.place[user] :]:  # all late readers read one view, so one kernel serves them
                    if times.is_late(other, node):
                        other.replace_input_with(node, copies[node])
            else:  # it waits already, or needs no wait
                return node
        return copies[node]

    for user in nodes:
        for node in user.all_input_nodes:
            if _is_worth_copying(times, sources, node) and times.is_late(user, node):
                with graph.inserting_before(user):
                    user.replace_input_with(node, copy(node, user))


def _is_worth_copying(times: _Times, sources: dict[Node, set[Node]], node: Node) -> bool:
    """Return whether recomputing a result saves enough memory.

    The result must be large and have a large source, and its first read must not be late.
    """
    has_large_source = any(is_operation(source) and times.is_large(source) for source in sources.get(node, ()))
    if not has_large_source or not times.is_large(node):
        return False
    return min(times.reads[without_views(node)]) - times.depth[node] <= _NEAR


def _delay_results(graph: Graph, times: _Times, delayed: dict[Node, Node]) -> None:
    """Let each delayed result wait for the other inputs of its reader."""
    for node in delayed:
        source = max(node.all_input_nodes, key=node_bytes)
        if without_views(source) in times.place:  # a copy waits already
            with graph.inserting_before(node):
                node.replace_input_with(source, insert_wait(graph, source, [_awaited(times, delayed, node)]))


def _awaited(times: _Times, delayed: dict[Node, Node], user: Node) -> Node:
    """Return the last result that the user waits for.

    A delayed user waits for the other inputs of its first reader.
    """
    if reader := delayed.get(user):
        others = [node for node in reader.all_input_nodes if without_views(node) is not user]
        latest = times.latest(others) if others else user
        if times.place.get(latest, times.place[user]) < times.place[user]:
            return latest
    return times.latest(user.all_input_nodes)


def _store_once(graph: Graph, times: _Times, sources: dict[Node, set[Node]]) -> None:
    """Store large fused results that are read late and cannot be recomputed.

    Otherwise Inductor computes a residual stream again at each read, from all tensors that were added to it, with a
    different kernel for each layer.
    """
    for node in times.place:
        is_stored = is_fused(node) and node not in sources and times.depth[node] > 0 and times.is_large(node)
        if is_stored and max(times.reads[node]) - times.depth[node] > _NEAR:
            with graph.inserting_after(node):
                stored = insert_wait(graph, node, [node])
            replace_other_uses(node, stored)
