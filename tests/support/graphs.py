"""What can be read from a graph of operations."""

from torch.fx import Node


def waits_for(node: Node) -> set[Node]:
    """All that must have run before it."""
    found, left = set(), [node]
    while left:
        new = [source for source in left.pop().all_input_nodes if source not in found]
        found.update(new)
        left += new
    return found
