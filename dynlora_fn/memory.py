"""How much memory a step takes at its peak, from its graph alone: nothing is run or allocated."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten

# Pointwise to a compiler that fuses, though not marked so: gathers, copies and what fills.
_FUSED = {aten.embedding.default, aten.cat.default, aten.stack.default, aten.full.default, aten.clone.default}
_FUSED |= {aten.scalar_tensor.default, aten.zeros_like.default, aten.ones_like.default, aten.constant_pad_nd.default}
_REDUCTIONS = {aten.sum, aten.mean, aten.amax, aten.amin, aten.any, aten.prod, aten._log_softmax, aten._softmax}


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

    The graph is gone through in the order in which it was traced. Each result is alive until its last use; what is
    computed element by element takes no memory where a compiler would compute it where it is used, or write it over the
    old state; what it reads stays alive instead.

    Args:
        step: pure, as for `compile_step`.
        args: what it is called with; looked at for shapes and dtypes alone, so that meta tensors do.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = tree_map(lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf, args)
        graph = make_fx(step, decomposition_table=_decompositions(), _allow_non_fake_inputs=True)(*fake).graph
    return Peak(sum(_bytes(leaf) for leaf in tree_leaves(args)), _peak(graph))


def _decompositions() -> dict[Any, Any]:
    from torch._inductor.decomposition import select_decomp_table  # noqa: PLC0415 (takes a second to import)

    return dict(select_decomp_table())


def _peak(graph: Graph) -> int:
    nodes = list(graph.nodes)
    buffers = _buffers(nodes)  # what each node's value is read from
    last_use = {}
    for position, node in enumerate(nodes):
        if node.op == "output" or buffers[node] == {node}:
            for source in node.all_input_nodes:
                last_use.update(dict.fromkeys(buffers[source], position))
    born: dict[int, int] = {}
    for position, node in enumerate(nodes):
        if node.op == "call_function" and buffers[node] == {node}:
            size = _bytes(node.meta.get("val"))
            born[position] = born.get(position, 0) + size
            after = last_use.get(node, position) + 1
            born[after] = born.get(after, 0) - size
    alive = peak = 0
    for position in range(len(nodes)):
        alive += born.get(position, 0)
        peak = max(peak, alive)
    return peak


def _buffers(nodes: Iterable[Node]) -> dict[Node, set[Node]]:
    buffers: dict[Node, set[Node]] = {}
    for node in nodes:
        inputs = set().union(*(buffers[source] for source in node.all_input_nodes))
        is_own = node.op != "output" and not _is_view(node) and not (_is_fused(node) and not _is_kept(node, inputs))
        buffers[node] = {node} if is_own else inputs
    return buffers


def _is_kept(node: Node, inputs: set[Node]) -> bool:
    """Whether a fused result gets memory: read by what is not fused, or used again and made of more than one thing."""
    users = [user for user in node.users if user.op != "output"]
    is_read_whole = any(not _is_fused(user) and not _is_reduction(user) for user in _through_views(users))
    return is_read_whole or (len(users) > 1 and len(inputs) > 1)


def _through_views(users: list[Node]) -> list[Node]:
    found = []
    for user in users:
        found += _through_views(list(user.users)) if _is_view(user) else [user]
    return [user for user in found if user.op != "output"]


def _is_view(node: Node) -> bool:
    if node.op != "call_function":
        return False
    schema = getattr(node.target, "_schema", None)
    is_alias = schema is not None and any(result.alias_info for result in schema.returns)
    return is_alias or node.target in (aten.reshape.default, aten._unsafe_view.default) or schema is None


def _is_fused(node: Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return node.op == "call_function" and (torch.Tag.pointwise in tags or node.target in _FUSED)


def _is_reduction(node: Node) -> bool:
    return getattr(node.target, "overloadpacket", None) in _REDUCTIONS


def _bytes(value: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
