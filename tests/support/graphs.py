"""Helpers that read a graph of operations."""

from torch.fx import Node


def waits_for(node: Node) -> set[Node]:
    """Return all nodes that must run before this one."""
    found, left = set(), [node]
    while left:
        new = [source for source in left.pop().all_input_nodes if source not in found]
        found.update(new)
        left += new
    return found
