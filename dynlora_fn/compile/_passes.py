"""What `compile_step` asks of Inductor: rewrites of the whole step's graph that keep its values.

A step holds its forward pass, backward pass and update in one graph, and every layer of a stack is a slice of one
tensor. Left alone, Inductor generates a kernel for each slice, since its offset is written into the code, so that
compile time grows with depth; and it forms all merged weights at the start, where they are all alive at once.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from dynlora_fn._core._torch import CustomGraphPass, get_hash_for_files
from dynlora_fn.bases import _ops as codes_ops
from dynlora_fn.compile import _ops, _order_all_gathers, _order_remat_blocks, _recompute_activations

_MODULES = (_ops, _order_all_gathers, _order_remat_blocks, _recompute_activations, codes_ops)  # part of the cache key

aten = torch.ops.aten
_CONVERT = torch.ops.prims.convert_element_type.default


def inductor_options() -> dict[str, Any]:
    return {"post_grad_custom_pre_pass": Rewrites()}


class Rewrites(CustomGraphPass):
    """A pass over the graph of a whole step, for Inductor's ``post_grad_custom_pre_pass``."""

    def __call__(self, graph: Graph) -> None:
        graph.eliminate_dead_code()  # a dead user is one all the same
        _order_remat_blocks.compute_in_turn(graph)
        for node in list(graph.nodes):
            if node.target is aten.addmm.default:
                _form_merged_weight(graph, node)
            elif node.target is torch.ops.dynlora_fn.dequantize.default:
                _dequantize_in_products(graph, node)
            elif node.target is aten.unbind.int:
                _separate_vectors(graph, node)
            elif node.target is aten.cat.default and _is_stack(node):
                _stack_at_once(graph, node)
        graph.eliminate_dead_code()
        _recompute_activations.recompute_activations(graph)
        _order_all_gathers.gather_in_turn(graph)
        graph.eliminate_dead_code()

    def uuid(self) -> Any:
        return get_hash_for_files((__file__, *(module.__file__ for module in _MODULES)))


def _form_merged_weight(graph: Graph, node: Node) -> None:
    """Forms a merged weight within the product that it is formed for. Apart from it, nothing would keep the scheduler
    from forming all of them at once, long before they are used."""
    arguments: Any = node.args
    base, b, a = arguments
    has_bias = base.meta["val"].shape != node.meta["val"].shape
    if has_bias or node.kwargs.get("beta", 1) != 1:
        return
    weight, with_b = node, False
    if (only := _only_user(weight)) and only.target is _CONVERT:
        weight = only
    if (only := _only_user(weight)) and only.target is aten.cat.default and _is_beside(only, weight, b):
        weight, with_b = only, True
    if (only := _only_user(weight)) and only.target is aten.permute.default:
        weight = only
    product, transposed = _only_user(weight), weight.target is aten.permute.default
    if product is None or product.target not in (aten.mm.default, aten.addmm.default) or product.kwargs:
        return
    operands: Any = product.args
    bias, x, right = operands if product.target is aten.addmm.default else (None, *operands)
    if right is weight and x is not weight and bias is not weight:
        rest = (b, a, node.kwargs.get("alpha", 1), with_b, transposed)
        if base.target is torch.ops.dynlora_fn.dequantize.default:
            _replace(graph, product, torch.ops.dynlora_fn.times_codes.default, (x, bias, *base.args[:2], *rest))
        else:
            _replace(graph, product, torch.ops.dynlora_fn.times_merged.default, (x, bias, base, *rest))


def _dequantize_in_products(graph: Graph, node: Node) -> None:
    """Dequantizes a base that is no part of a merged weight within each product that it is dequantized for."""
    for user in list(node.users):
        transposed = user.target is aten.permute.default
        for product in list(user.users) if transposed else [user]:
            weight, operands = user if transposed else node, product.args
            if product.target is aten.mm.default and operands[1] is weight and operands[0] is not weight:
                arguments = (operands[0], None, *node.args[:2], None, None, 1.0, False, transposed)
                _replace(graph, product, torch.ops.dynlora_fn.times_codes.default, arguments)


def _is_beside(cat: Node, weight: Node, b: Any) -> bool:
    """Whether it is the weight and then `b`, in whichever dtype of the two."""
    members = _members(cat)
    if len(members) != 2 or members[0] is not weight or cat.args[1:] not in ((1,), (-1,)):
        return False
    plain = [node.args[0] if node.target is _CONVERT else node for node in (members[1], b)]
    return plain[0] is plain[1]


def _separate_vectors(graph: Graph, node: Node) -> None:
    """Gives each vector of a stack memory of its own, so that all layers share the kernels that read it."""
    for member in list(node.users):
        if member.meta["val"].ndim <= 1:
            _replace(graph, member, torch.ops.dynlora_fn.separate.default, (member,))


def _is_stack(node: Node) -> bool:
    """Whether it is how `torch.stack` arrives here: members of one shape behind each other, and then a view."""
    members, view = _members(node), _only_user(node)
    shapes = {member.meta["val"].shape for member in members}
    if view is None or view.target not in (aten.view.default, aten.reshape.default) or node.args[1:] not in ((), (0,)):
        return False
    return len(shapes) == 1 and view.meta["val"].shape == (len(members), *shapes.pop())


def _stack_at_once(graph: Graph, node: Node) -> None:
    """One copy of all members. What was done to each alike, transposing and scaling, is done to the whole instead."""
    members, after = _members(node), []
    while wrapper := _common_wrapper(members):
        after.append(wrapper)
        members = [member.args[0] for member in members]
    with graph.inserting_before(node):
        new = graph.call_function(torch.ops.dynlora_fn.stack.default, (members,))
        new.meta["val"] = torch.stack([member.meta["val"] for member in members])
        for target, arguments in reversed(after):
            if target is aten.permute.default:  # behind the axis of the stack
                arguments = ([0, *(dim + 1 for dim in arguments[0])],)  # noqa: PLW2901
            value = target(new.meta["val"], *arguments)
            new = graph.call_function(target, (new, *arguments))
            new.meta["val"] = value
    next(iter(node.users)).replace_all_uses_with(new)


def _common_wrapper(members: list[Any]) -> tuple[Any, tuple[Any, ...]] | None:
    """The operation and its further arguments that made all of the members, if there is one."""
    wrappers = {(member.target, str(member.args[1:])) for member in members}
    target = members[0].target
    is_movable = target in (aten.permute.default, aten.div.Tensor) and all(_only_user(member) for member in members)
    arguments = tuple(members[0].args[1:])
    if len(wrappers) > 1 or not is_movable or any(isinstance(argument, Node) for argument in arguments):
        return None
    return target, arguments


def _members(cat: Node) -> list[Any]:
    members: Any = cat.args[0]
    return list(members)


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _replace(graph: Graph, node: Node, target: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    with graph.inserting_after(node):
        new = graph.call_function(target, arguments)
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
