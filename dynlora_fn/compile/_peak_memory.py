"""Compute the peak memory of a step from its graph, without running it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from dynlora_fn._core._check import check_callable
from dynlora_fn._core._torch import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    compiling,
    tree_leaves,
    tree_map,
)
from dynlora_fn.compile._graph import (
    bytes_of,
    depths,
    is_fused,
    is_operation,
    is_reduction,
    is_view,
    node_bytes,
    read_depths,
)


class Peak(NamedTuple):
    """The bytes of memory that a step takes at its peak."""

    state: int  # of the arguments, which stay alive during the step
    step: int  # of everything else, at the moment of the peak

    @property
    def total(self) -> int:
        return self.state + self.step


def peak_memory(step: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Peak:
    """Compute the peak memory of ``compile_step(step)`` with a donated state.

    The step is traced and changed by the same graph passes, but not compiled or run, and nothing is allocated. A result
    is counted from its computation to its last use. Two orders are tried, the order of the graph and each result as
    early as possible, and the smaller peak is returned. A fused result is not counted if a compiler computes it inside
    its readers, or writes it over the old state. Its inputs then stay alive instead.

    While the step is traced, `torch.compiler.is_compiling` returns True, so that models take the same branches as in
    the compiled step.

    Args:
        step: A pure function, as for `compile_step`.
        args: The arguments of the step. Only shapes and dtypes are read, so they may be on the meta device.
        kwargs: The keyword arguments of the step.

    Returns:
        The bytes of the arguments and of the step, as a `Peak`.

    Raises:
        TypeError: If `step` is not a function.
        ValueError: If `step` reads the value of a tensor, as `item()` and `if` do, or has a result whose shape depends
            on values. `compile_step` refuses such a step too.

    Example:
        >>> peak_memory(lambda x: torch.cumsum(x, 0), torch.ones(1000))
        Peak(state=4000, step=4000)
    """
    check_callable("step", step)
    from dynlora_fn.compile._passes import GraphPasses  # noqa: PLC0415 (Inductor takes a second to import)

    graph = _trace(step, args, kwargs)
    GraphPasses()(graph)
    nodes = list(graph.nodes)
    # A compiler also chooses between orders by their peaks.
    peak = min(_peak_in_order(nodes), _peak_in_order(_earliest_order(nodes)))
    return Peak(sum(bytes_of(leaf) for leaf in tree_leaves((args, kwargs))), peak)


def _trace(step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Graph:
    """Trace a step with fake tensors that have the shapes and dtypes of the arguments."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, compiling():
        fake = tree_map(lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        trace = make_fx(
            lambda args, kwargs: step(*args, **kwargs),
            decomposition_table=_decompositions(),
            _allow_non_fake_inputs=True,
        )
        try:
            return trace(*fake).graph
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ValueError(
                f"`step` calls {error.func}, whose result depends on values of tensors, so it cannot be in one graph;"
                " use `torch.where` in place of `if`, and no `item()`, `nonzero()` or boolean masks as indices"
            ) from error


def _decompositions() -> dict[Any, Any]:
    from dynlora_fn._core._torch import select_decomp_table  # noqa: PLC0415 (takes a second to import)

    return dict(select_decomp_table())


def _peak_in_order(nodes: list[Node]) -> int:
    """Return the peak of the bytes beyond the arguments, with nodes in this order."""
    stored = _stored_results(nodes)
    last_use: dict[Node, int] = {}
    for position, node in enumerate(nodes):
        if node.op == "output" or stored[node] == {node}:
            for source in node.all_input_nodes:
                last_use.update(dict.fromkeys(stored[source], position))
    change = [0] * (len(nodes) + 1)  # of the bytes that are alive, at each position
    for position, node in enumerate(nodes):
        if is_operation(node) and stored[node] == {node}:
            change[position] += node_bytes(node)
            change[last_use.get(node, position) + 1] -= node_bytes(node)
    alive = peak = 0
    for difference in change:
        alive += difference
        peak = max(peak, alive)
    return peak


def _earliest_order(nodes: list[Node]) -> list[Node]:
    """Sort the nodes by depth.

    A node that depends only on arguments comes right before its first use.
    """
    depth = depths(nodes)
    when: dict[Node, int] = {}
    for node in reversed(nodes):
        users = [when[user] for user in node.users]
        needs_only_arguments = all(depth[source] == 0 for source in node.all_input_nodes)
        when[node] = min(users) if needs_only_arguments and users else depth[node]
    return sorted(nodes, key=lambda node: when[node])


def _stored_results(nodes: list[Node]) -> dict[Node, set[Node]]:
    """Return the stored results from which the value of each node is read.

    For a stored node this is only the node itself.
    """
    stored: dict[Node, set[Node]] = {}
    reads = read_depths(nodes, depths(nodes))
    for node in nodes:
        # The value of a view depends only on its first input. It may wait for other inputs, as `after` does.
        sources = node.all_input_nodes[:1] if is_view(node) else node.all_input_nodes
        inputs = set().union(*(stored[source] for source in sources))
        is_stored = node.op != "output" and not is_view(node)
        if is_fused(node):
            is_stored = _is_fused_result_stored(node, is_read_again=len(inputs) > 1 and len(set(reads[node])) > 1)
        stored[node] = {node} if is_stored else inputs
    return stored


def _is_fused_result_stored(node: Node, *, is_read_again: bool) -> bool:
    """Return whether a fused result takes memory.

    It does in three cases. It is a concatenation. Or it is read by an operation that is neither fused nor a reduction.
    Or it is computed from several stored results and read again later.
    """
    users = [user for user in node.users if user.op != "output"]
    has_unfused_reader = any(not is_fused(user) and not is_reduction(user) for user in _through_views(users))
    return is_read_again or has_unfused_reader or (node.target is torch.ops.aten.cat.default and bool(users))


def _through_views(users: list[Node]) -> list[Node]:
    """Return the users, with the readers of each view in its place."""
    found = []
    for user in users:
        found += _through_views(list(user.users)) if is_view(user) else [user]
    return [user for user in found if user.op != "output"]
