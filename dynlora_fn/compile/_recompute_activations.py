"""What a graph of a whole step keeps from its forward pass for its backward pass.

`torch.compile` of a model decides this where it splits the graph into the two passes. A step that holds both is never
split, and would keep every activation that is used again.
"""

from collections.abc import Iterable
from operator import getitem
from typing import Any

import torch
from torch.fx import Graph, Node

import dynlora_fn.compile._ops  # noqa: F401 (registers the operations)
from dynlora_fn._core._torch import OpOverload
from dynlora_fn.compile._graph import bytes_of, depths, is_fused, is_view, uses, without_views

_NEAR = 2  # products between two uses: what is kept that much longer makes no peak
_WORTH = 100  # below this part of the largest result, a copy is not worth a kernel


def recompute_activations(graph: Graph) -> None:
    """Computes results anew for uses long after the first ones, if they are made by pointwise operations of what is
    kept about as long anyway; all else that is kept is formed once. Values stay as they are, and less is alive in
    between."""
    _Saved(graph).rewrite()


class _Saved:
    def __init__(self, graph: Graph):
        self.graph = graph
        self.nodes = list(graph.nodes)
        self.place = {node: number for number, node in enumerate(self.nodes)}
        self.depth = depths(self.nodes)
        self.uses = uses(self.nodes, self.depth)
        self.sources = _sources(self.nodes, self.uses, self.depth)
        self.enough = max((_size(node) for node in self.nodes), default=0) / _WORTH
        self.copies: dict[Node, Node] = {}
        self.first_user = {node: self.reader(node) for node in self.nodes if self.is_early(node)}
        self.depth.update({node: min(self.uses[node]) - 1 for node in self.first_user})

    def rewrite(self) -> None:
        for user in self.nodes:
            for node in user.all_input_nodes:
                if self.is_worth_it(node) and self.is_late(user, node):
                    with self.graph.inserting_before(user):
                        user.replace_input_with(node, self.copy(node, user))
        for node in self.first_user:
            source = max(node.all_input_nodes, key=_size)
            if without_views(source) in self.uses:  # no copy, which is late itself
                with self.graph.inserting_before(node):
                    node.replace_input_with(source, _after(self.graph, source, self.latest(node)))
        for node in self.nodes:
            if self.is_kept(node):
                with self.graph.inserting_after(node):
                    formed = _after(self.graph, node, node)
                node.replace_all_uses_with(formed, delete_user_cb=lambda user, formed=formed: user is not formed)

    def is_late(self, user: Node, node: Node) -> bool:
        return user in self.depth and self.depth[user] - self.depth[node] > _NEAR

    def is_worth_it(self, node: Node) -> bool:
        """Whether it is large, made of what is large, and used at once as well: else it is late altogether."""
        kept = [source for source in self.sources.get(node, set()) if _is_result(source)]
        is_large = self.is_large(node) and any(self.is_large(source) for source in kept)
        return is_large and min(self.uses[without_views(node)]) - self.depth[node] <= _NEAR

    def is_large(self, node: Node) -> bool:
        return _size(node) >= self.enough

    def is_early(self, node: Node) -> bool:
        """Whether it is a large result, used late alone, of what is kept until then anyway."""
        is_own = isinstance(node.target, OpOverload) and not is_fused(node) and not is_view(node)
        if not is_own or not node.all_input_nodes or not _is_pure(node) or not self.is_large(node):
            return False
        first = min(self.uses[node])
        sources = [without_views(source) for source in node.all_input_nodes]
        is_kept = all(not _is_result(source) or max(self.uses[source]) >= first for source in sources)
        return is_kept and first - self.depth[node] > _NEAR

    def reader(self, node: Node) -> Node:
        """The first to read it: by way of views and pointwise operations, or those if nothing else does."""
        user = min(node.users, key=lambda user: min(self.uses[user]) if is_view(user) else self.depth[user])
        return self.reader(user) if (is_view(user) or is_fused(user)) and user.users else user

    def latest(self, user: Node) -> Node:
        """Of all results that the user waits for, the one formed last; an early one waits as its reader does."""
        if reader := self.first_user.get(user):
            others = [node for node in reader.all_input_nodes if without_views(node) is not user]
            if others and self.place.get(node := _latest(others, self.depth), len(self.place)) < self.place[user]:
                return node
        return _latest(user.all_input_nodes, self.depth)

    def is_kept(self, node: Node) -> bool:
        """Whether it is pointwise and used late. Left alone, Inductor would form a residual stream anew at each of its
        uses out of all that was ever added to it, by a kernel of its own for each layer."""
        is_made = is_fused(node) and node not in self.sources and self.depth[node] > 0
        return is_made and self.is_large(node) and max(self.uses[node]) - self.depth[node] > _NEAR

    def copy(self, node: Node, user: Node) -> Node:
        """The node once more, for a user and all that come later; of what is kept, another name."""
        if node not in self.copies:
            if node in self.sources:
                self.copies[node] = self.graph.node_copy(node, lambda source: self.copy(source, user))
            elif _is_result(node) and self.is_large(node):
                self.copies[node] = _after(self.graph, node, self.latest(user))
                for other in self.nodes[self.place[user] :]:  # one name, so that they share a kernel that reads it
                    if self.is_late(other, node):
                        other.replace_input_with(node, self.copies[node])
            else:
                return node
        return self.copies[node]


def _after(graph: Graph, node: Node, other: Node) -> Node:
    """The node, but not before the other. Inductor would fuse both computations of one result into one kernel, and keep
    what is computed again all the same."""
    after = graph.call_function(torch.ops.dynlora_fn.after.default, (node, [other]))
    after.meta["val"] = node.meta["val"]
    return after


def _latest(nodes: Iterable[Node], depth: dict[Node, int]) -> Node:
    """Of all results that these are or wait for, the one that is formed last."""
    node = max(nodes, key=lambda node: depth.get(node, 0))
    is_formed = (not is_view(node) and not is_fused(node)) or node.target is getitem
    return node if is_formed or not node.all_input_nodes else _latest(node.all_input_nodes, depth)


def _sources(nodes: list[Node], uses: dict[Node, list[int]], depth: dict[Node, int]) -> dict[Node, set[Node]]:
    """Of each result that can be computed anew until its last use, what is kept that it is made of: arguments, and
    results that cannot."""
    sources: dict[Node, set[Node]] = {}
    until: dict[Node, int] = {}  # the last use of a result, or of what else is computed anew for it
    for node in nodes:
        inputs = node.all_input_nodes
        is_pointwise = is_fused(node) and _is_pure(node)
        if not is_pointwise and not (is_view(node) and any(source in sources for source in inputs)):
            continue
        kept = set().union(*(sources.get(source, {without_views(source)}) for source in inputs))
        copied = max((until[source] for source in inputs if source in sources), default=0)
        first = min((use for use in uses[node] if use - depth[node] > _NEAR), default=copied)
        # What is kept stays as long, and what is copied for this is not kept long after it: of a chain of sums, such as
        # a residual stream, the first would else bring back all the others.
        if copied - first <= _NEAR and all(
            max(uses[node]) - max(uses[one]) <= _NEAR for one in kept if _is_result(one)
        ):
            sources[node], until[node] = kept, max(copied, *uses[node])
    return sources


def _is_result(node: Node) -> bool:
    return node.op == "call_function"


def _is_pure(node: Node) -> bool:
    target: Any = node.target
    return not (torch.Tag.nondeterministic_seeded in target.tags or target._schema.is_mutable)


def _size(node: Node) -> int:
    return bytes_of(node.meta.get("val"))
