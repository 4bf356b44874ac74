"""The graph passes that `compile_step` adds to Inductor.

They change the graph of a step and keep its values. A step has its forward pass, backward pass and update in one graph,
and every layer of a stack is a slice of one tensor. Without these passes Inductor writes the offset of each slice into
a kernel and generates one for each layer, so compile time grows with depth. It also forms all merged weights first, and
all of them are alive at once.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.fx import Graph, Node

from dynlora_fn._core._torch import CustomGraphPass
from dynlora_fn.compile import _order_all_gathers, _order_remat_blocks, _recompute_activations
from dynlora_fn.compile._cache import cache_options, library_key
from dynlora_fn.compile._graph import replace_other_uses

aten, ops = torch.ops.aten, torch.ops.dynlora_fn
_CONVERT = torch.ops.prims.convert_element_type.default


def merge_in_products(graph: Graph) -> None:
    """Form each merged weight inside the product that reads it.

    A merged weight is ``base + scale * b @ a``. If it were a separate operation, the scheduler could form all merged
    weights long before they are read.
    """
    for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
        base, b, a = node.args
        has_bias = base.meta["val"].shape != node.meta["val"].shape
        if not has_bias and node.kwargs.get("beta", 1) == 1:
            _merge_in_product(graph, node, base, b, a)


def _merge_in_product(graph: Graph, merged: Node, base: Node, b: Node, a: Node) -> None:
    weight, with_b = _only_user(merged, _CONVERT) or merged, False
    if (joined := _only_user(weight, aten.cat.default)) and _is_beside(joined, weight, b):
        weight, with_b = joined, True
    weight = _only_user(weight, aten.permute.default) or weight
    product = _only_user(weight, aten.mm.default, aten.addmm.default)
    if product is None or product.kwargs:
        return
    operands: Any = product.args
    bias, x, right = operands if product.target is aten.addmm.default else (None, *operands)
    if right is not weight or x is weight or bias is weight:
        return
    is_transposed = weight.target is aten.permute.default
    factors = (b, a, merged.kwargs.get("alpha", 1), with_b, is_transposed)
    if base.target is ops.dequantize.default:
        _replace(graph, product, ops.times_codes.default, (x, bias, *base.args[:2], *factors))
    else:
        _replace(graph, product, ops.times_merged.default, (x, bias, base, *factors))


def _is_beside(joined: Node, weight: Node, b: Node) -> bool:
    """Return whether the weight and `b` are joined by columns.

    `b` may be converted to the dtype of the weight.
    """
    members = _members(joined)
    if len(members) != 2 or members[0] is not weight or joined.args[1:] not in ((1,), (-1,)):
        return False
    unconverted = [node.args[0] if node.target is _CONVERT else node for node in (members[1], b)]
    return unconverted[0] is unconverted[1]


def dequantize_in_products(graph: Graph) -> None:
    """Dequantize each base that is not merged inside each product that reads it."""
    for dense in graph.find_nodes(op="call_function", target=ops.dequantize.default):
        for user in list(dense.users):
            is_transposed = user.target is aten.permute.default
            weight = user if is_transposed else dense
            for product in list(user.users) if is_transposed else [user]:
                operands = product.args
                if product.target is aten.mm.default and operands[1] is weight and operands[0] is not weight:
                    arguments = (operands[0], None, *dense.args[:2], None, None, 1.0, False, is_transposed)
                    _replace(graph, product, ops.times_codes.default, arguments)


def separate_vectors(graph: Graph) -> None:
    """Copy each vector of a stack into memory without an offset.

    Then all layers share the kernels that read the vector.
    """
    for stack in graph.find_nodes(op="call_function", target=aten.unbind.int):
        for vector in list(stack.users):
            if vector.meta["val"].ndim <= 1:
                _replace(graph, vector, ops.separate.default, (vector,))


def stack_in_one_copy(graph: Graph) -> None:
    """Stack all members with one kernel instead of one per layer.

    A transposition or division of every member is applied once to the stack instead.
    """
    for joined in graph.find_nodes(op="call_function", target=aten.cat.default):
        if _is_stack(joined):
            _stack_in_one_copy(graph, joined)


def _is_stack(joined: Node) -> bool:
    """Return whether a `cat` comes from `torch.stack`.

    Such a `cat` joins members of one shape by rows, and a view follows.
    """
    members, view = _members(joined), _only_user(joined, aten.view.default, aten.reshape.default)
    shapes = {member.meta["val"].shape for member in members}
    if view is None or joined.args[1:] not in ((), (0,)) or len(shapes) != 1:
        return False
    return bool(view.meta["val"].shape == (len(members), *shapes.pop()))


def _stack_in_one_copy(graph: Graph, joined: Node) -> None:
    members, wrappers = _members(joined), []
    while wrapper := _common_wrapper(members):
        wrappers.append(wrapper)
        members = [member.args[0] for member in members]
    with graph.inserting_before(joined):
        new = graph.call_function(ops.stack.default, (members,))
        new.meta["val"] = torch.stack([member.meta["val"] for member in members])
        for target, arguments in reversed(wrappers):
            if target is aten.permute.default:  # after the axis of the stack
                arguments = ([0, *(dim + 1 for dim in arguments[0])],)  # noqa: PLW2901
            value = target(new.meta["val"], *arguments)
            new = graph.call_function(target, (new, *arguments))
            new.meta["val"] = value
    next(iter(joined.users)).replace_all_uses_with(new)


def _common_wrapper(members: list[Any]) -> tuple[Any, tuple[Any, ...]] | None:
    """Return the permutation or division that computes all members, and its arguments.

    Return None if the members are computed differently, or have other users.
    """
    wrappers = {(member.target, str(member.args[1:])) for member in members}
    target, arguments = members[0].target, tuple(members[0].args[1:])
    is_movable = target in (aten.permute.default, aten.div.Tensor) and all(_only_user(member) for member in members)
    if len(wrappers) > 1 or not is_movable or any(isinstance(argument, Node) for argument in arguments):
        return None
    return target, arguments


def remove_dead_code(graph: Graph) -> None:
    """Remove nodes that earlier passes have replaced.

    Otherwise later passes would count them as readers and count their memory.
    """
    graph.eliminate_dead_code()


def _members(joined: Node) -> list[Any]:
    members: Any = joined.args[0]
    return list(members)


def _only_user(node: Node, *targets: Callable[..., Any]) -> Node | None:
    """Return the only user of the node if it calls one of `targets`, else None.

    Without `targets`, any user is returned.
    """
    user = next(iter(node.users)) if len(node.users) == 1 else None
    return user if user and (not targets or user.target in targets) else None


def _replace(graph: Graph, node: Node, target: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    with graph.inserting_after(node):
        new = graph.call_function(target, arguments)
    new.meta["val"] = node.meta["val"]
    replace_other_uses(node, new)


# The order matters. Weights move into their products before `recompute_activations` measures times and memory. And
# all-gathers move last, when the readers of the gathered weights are final.
PASSES: dict[str, Callable[[Graph], None]] = {
    "order_remat_blocks": _order_remat_blocks.order_remat_blocks,
    "merge_in_products": merge_in_products,
    "dequantize_in_products": dequantize_in_products,
    "separate_vectors": separate_vectors,
    "stack_in_one_copy": stack_in_one_copy,
    "remove_dead_code": remove_dead_code,
    "recompute_activations": _recompute_activations.recompute_activations,
    "order_all_gathers": _order_all_gathers.order_all_gathers,
}


class GraphPasses(CustomGraphPass):
    """All `PASSES` in their order, as ``post_grad_custom_pre_pass`` of Inductor.

    Args:
        skip: The names of passes to leave out, to find a pass that causes a problem.

    Raises:
        ValueError: If `skip` contains a name that is not in `PASSES`.
    """

    def __init__(self, skip: Collection[str] = ()):
        if unknown := set(skip) - set(PASSES):
            raise ValueError(f"`skip` names unknown graph passes {sorted(unknown)}; choose from {list(PASSES)}")
        self.names = [name for name in PASSES if name not in skip]

    def __call__(self, graph: Graph) -> None:
        remove_dead_code(graph)  # passes count the users of a node, and would count dead users too
        for name in self.names:
            PASSES[name](graph)
        remove_dead_code(graph)

    def uuid(self) -> Any:
        """Return the key of these passes in torch's caches of compiled graphs."""
        key = library_key()
        return key and f"{key}, {self.names}"


def inductor_options() -> dict[str, Any]:
    return {"post_grad_custom_pre_pass": GraphPasses(), **cache_options()}
