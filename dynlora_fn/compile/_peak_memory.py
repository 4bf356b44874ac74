"""How much memory a step takes at its peak, from its graph alone: nothing is run or allocated."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from dynlora_fn._core._torch import FakeTensorMode, tree_leaves, tree_map
from dynlora_fn.compile._graph import bytes_of, depths, is_fused, is_reduction, is_view, uses


class Peak(NamedTuple):
    """Bytes."""

    state: int  # what is passed in, and stays
    step: int  # beyond that, at the moment of the most

    @property
    def total(self) -> int:
        return self.state + self.step


def peak_memory(step: Callable[..., Any], *args: Any) -> Peak:
    """The memory of ``compile_step(step)(*args)``, donated: the arguments, and what a compiler that fuses keeps beside
    them.

    Results are formed in the order of the graph, or each as soon as what it waits for is there, whichever takes less,
    and are alive until their last use. What is computed element by element takes no memory where a compiler would
    compute it where it is used, or write it over the old state; what it reads stays alive instead.

    Args:
        step: pure, as for `compile_step`.
        args: what it is called with; looked at for shapes and dtypes alone, so that meta tensors do.
    """
    from dynlora_fn.compile._passes import Rewrites  # noqa: PLC0415 (Inductor takes a second to import)

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = tree_map(lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf, args)
        graph = make_fx(step, decomposition_table=_decompositions(), _allow_non_fake_inputs=True)(*fake).graph
    Rewrites()(graph)
    nodes = list(graph.nodes)
    # A compiler chooses among orders by the peak as well.
    return Peak(sum(bytes_of(leaf) for leaf in tree_leaves(args)), min(_peak(nodes), _peak(_as_soon_as_ready(nodes))))


def _decompositions() -> dict[Any, Any]:
    from dynlora_fn._core._torch import select_decomp_table  # noqa: PLC0415 (takes a second to import)

    return dict(select_decomp_table())


def _peak(nodes: list[Node]) -> int:
    """Of the nodes in this order."""
    buffers = _buffers(nodes)  # what each node's value is read from
    last_use = {}
    for position, node in enumerate(nodes):
        if node.op == "output" or buffers[node] == {node}:
            for source in node.all_input_nodes:
                last_use.update(dict.fromkeys(buffers[source], position))
    born: dict[int, int] = {}
    for position, node in enumerate(nodes):
        if node.op == "call_function" and buffers[node] == {node}:
            size = bytes_of(node.meta.get("val"))
            born[position] = born.get(position, 0) + size
            after = last_use.get(node, position) + 1
            born[after] = born.get(after, 0) - size
    alive = peak = 0
    for position in range(len(nodes)):
        alive += born.get(position, 0)
        peak = max(peak, alive)
    return peak


def _as_soon_as_ready(nodes: list[Node]) -> list[Node]:
    """Each as soon as what it waits for is there; what waits for arguments alone, when it is first used."""
    depth = depths(nodes)
    when: dict[Node, int] = {}
    for node in reversed(nodes):
        users = [when[user] for user in node.users]
        is_start = all(depth[source] == 0 for source in node.all_input_nodes)
        when[node] = min(users) if is_start and users else depth[node]
    return sorted(nodes, key=lambda node: when[node])


def _buffers(nodes: list[Node]) -> dict[Node, set[Node]]:
    buffers: dict[Node, set[Node]] = {}
    when = uses(nodes, depths(nodes))
    for node in nodes:
        sources = node.all_input_nodes[:1] if is_view(node) else node.all_input_nodes  # not what it is to come after
        inputs = set().union(*(buffers[source] for source in sources))
        is_own = node.op != "output" and not is_view(node)
        if is_fused(node):
            is_own = _is_kept(node, is_again=len(inputs) > 1 and len(set(when[node])) > 1)
        buffers[node] = {node} if is_own else inputs
    return buffers


def _is_kept(node: Node, *, is_again: bool) -> bool:
    """Whether a fused result gets memory: joined of others, read by what is not fused, or made of more than one thing
    and used again later on."""
    users = [user for user in node.users if user.op != "output"]
    is_read_whole = any(not is_fused(user) and not is_reduction(user) for user in _through_views(users))
    return is_again or is_read_whole or (node.target is torch.ops.aten.cat.default and bool(users))


def _through_views(users: list[Node]) -> list[Node]:
    found = []
    for user in users:
        found += _through_views(list(user.users)) if is_view(user) else [user]
    return [user for user in found if user.op != "output"]
