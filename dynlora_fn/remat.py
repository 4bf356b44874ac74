"""Blocks that keep only their inputs for the backward pass and are computed again in it."""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import compress, count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from dynlora_fn.base import Autocast, autocast_now
from dynlora_fn.module import call, params_of
from dynlora_fn.tree import match
from dynlora_fn.types import LowRank

_RANDOM = (nn.modules.dropout._DropoutNd, nn.RReLU)


def remat(model: nn.Module, blocks: Sequence[str]) -> nn.Module:
    """A model of the same values, gradients and parameter names whose `blocks` keep their inputs alone.

    What a block computes is freed after the forward pass and computed again, once, in the backward pass: one more
    forward pass in time for the activations of one block at a time in memory (arXiv:1604.06174). Unlike
    `torch.utils.checkpoint` it works under `torch.func.grad` and inside one compiled graph, as well as through
    `torch.autograd.grad`.

    Args:
        model: left as it is. The result shares its parameters and buffers, and goes wherever the model went:
            ``call(remat(model, ["layers.*"]), params, x)``.
        blocks: names or globs of its submodules, as `nn.Module.named_modules` has them. They return a tensor or a
            tuple of tensors.

    Raises:
        ValueError: if a pattern matches nothing; at the call, if a block draws random numbers, since it would draw
            others the second time. Within a compiled graph this is seen of modules, such as `nn.Dropout`, alone.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    return _copy(model, "", set(match(modules, blocks, "blocks")))


def _copy(module: nn.Module, name: str, blocks: set[str]) -> nn.Module:
    new = copy.copy(module)
    if name in blocks:
        # A subclass, so that whoever asks for the block's type or attributes finds them.
        new.__class__ = type(type(module).__name__, (_Block, type(module)), {})
        number = next(_NUMBERS)
        new.__dict__["_block"], new.__dict__["_number"] = (
            module,
            number,
        )  # not a submodule: it holds the same parameters
        _BLOCKS[number] = module
        return new
    prefix = f"{name}." if name else ""
    children = {key: child and _copy(child, prefix + key, blocks) for key, child in module._modules.items()}
    new.__dict__["_modules"] = children
    return new


# A compiled graph holds numbers, not modules.
_NUMBERS = count()
_BLOCKS: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()


class _Block(nn.Module):
    _block: nn.Module
    _number: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        _check_not_random(self._block)
        params = {name: tuple(leaf) if isinstance(leaf, LowRank) else leaf for name, leaf in params_of(self).items()}
        device_type = next(leaf.device.type for leaf in tree_leaves((params, args)) if isinstance(leaf, Tensor))
        return _recomputed(self._number, params, args, kwargs, autocast_now(device_type))


# Dynamo fails on such a function under `torch.func`. Left to AOTAutograd, it runs as it is written.
@torch.compiler.allow_in_graph
def _recomputed(
    number: int, params: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any], autocast: Autocast | None
) -> Any:
    leaves, structure = tree_flatten((params, args, kwargs))
    is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
    block = _BLOCKS[number]

    def run(*tensors: Tensor) -> Any:
        rest = iter(tensors)
        filled = [next(rest) if is_one else leaf for leaf, is_one in zip(leaves, is_tensor, strict=True)]
        params, args, kwargs = tree_unflatten(filled, structure)
        params = {name: LowRank(*leaf) if isinstance(leaf, tuple) else leaf for name, leaf in params.items()}
        with torch.autocast(*autocast) if autocast else nullcontext():
            return call(block, params, *args, **kwargs)

    return _Recomputed.apply(run, *compress(leaves, is_tensor))


class _Recomputed(torch.autograd.Function):
    """``run(*tensors)``. Keeps its arguments alone."""

    @staticmethod
    def forward(run: Callable[..., Any], *tensors: Tensor) -> Any:
        return run(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.run, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors, is_needed = ctx.saved_tensors, ctx.needs_input_grad[1:]

        def run(*needed: Tensor) -> Any:
            rest = iter(needed)
            return ctx.run(*(next(rest) if is_one else t for t, is_one in zip(tensors, is_needed, strict=True)))

        _, pull_back = torch.func.vjp(run, *compress(tensors, is_needed))
        found = iter(pull_back(grads if len(grads) > 1 else grads[0]))
        return None, *(next(found) if is_one else None for is_one in is_needed)


def _check_not_random(block: nn.Module) -> None:
    for name, module in block.named_modules():
        if isinstance(module, _RANDOM) and module.training and getattr(module, "p", 1) > 0:
            rule = "must draw no random numbers to be computed twice"
            raise ValueError(f"a block of `remat` {rule}, got {module!r} at {name!r} in training")
