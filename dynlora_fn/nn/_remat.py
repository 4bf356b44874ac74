"""`remat`: recompute blocks in the backward pass."""

import copy
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from dynlora_fn._core._check import check_module
from dynlora_fn._core._dtypes import Autocast, autocast_now
from dynlora_fn._core._patterns import match
from dynlora_fn._core._torch import (
    forward_levels,
    tree_flatten,
    tree_leaves,
    tree_unflatten,
)
from dynlora_fn._core._types import LowRank
from dynlora_fn.nn._block_refusals import (
    Before,
    RefuseRandom,
    refuse_attached_attributes,
    refuse_changes,
    refuse_hidden_gradients,
    refuse_hidden_results,
    refuse_written,
    running_statistics,
    without_alias,
)
from dynlora_fn.nn._call import call_with
from dynlora_fn.nn._recomputed import Recomputed
from dynlora_fn.nn._turns import Caller, current_caller
from dynlora_fn.nn._view import Fallback
from dynlora_fn.nn._weight import fallback_of, params_of


def remat(model: nn.Module, blocks: Sequence[str]) -> nn.Module:
    """Return a model whose `blocks` save only their inputs for the backward pass.

    Values, gradients, parameter names and what blocks write to their buffers stay the same.

    The activations of a block are freed after the forward pass and computed once more in the backward pass. This takes
    the time of one more forward pass, and only the activations of one block are in memory at a time (arXiv:1604.06174).
    It works under `torch.func.grad`, which refuses `torch.utils.checkpoint`, with `torch.autograd.grad`, and inside one
    compiled graph. In forward mode, blocks are computed once and save their activations.

    In a compiled step, the recomputation of a block waits for all gradients of the block after it. Inductor keeps some
    freed memory for later tensors of the same size. ``compile_step(..., options={"allow_buffer_reuse": False})`` frees
    it at once: the peak memory is up to a tenth lower, at some cost in time.

    In a compiled graph a block is traced once for training and once for evaluation. Except for `training`, the
    attributes of the module that its forward pass reads must not change. Its hooks run again in the recomputation.

    Args:
        model: The model, which is not changed. Pass the result to `call` instead of the model:
            ``call(remat(model, ["layers.*"]), params, x)``. Both share parameters and buffers.
        blocks: Names or globs of submodules, as in `nn.Module.named_modules`. They return tensors and constants, also
            in tuples, lists and dicts. Compiled, they return no dicts.

    Returns:
        A copy of the model, with the same tensors.

    Raises:
        TypeError: If `model` is not a module, or `blocks` is not a list of names or globs.
        ValueError: If a pattern matches no submodule.
        NotImplementedError: In a call of the model, if a block draws random numbers, since they would differ in the
            recomputation. This is checked at the first call in training and in evaluation. Also if an attribute of a
            block that is not a parameter or buffer is differentiated, or tensors in an object that is passed or
            returned, because their gradients would be lost. If a block changes its arguments, such as a cache of keys.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> x = torch.ones(2, 4)
        >>> torch.equal(remat(model, ["?"])(x), model(x))
        True
    """
    check_module("model", model)
    modules = {name: module for name, module in model.named_modules() if name}
    return _copy(model, {modules[name] for name in match(modules, blocks, "blocks")}, {})


def _copy(module: nn.Module, blocks: set[nn.Module], copies: dict[nn.Module, nn.Module]) -> nn.Module:
    """Return a copy of a module and its children, in which `blocks` are recomputed.

    A module at two paths has one copy, so it is a block at both paths if one of its names is selected.
    """
    if module in copies:
        return copies[module]
    new = copies[module] = copy.copy(module)
    if module in blocks:
        # `_block` runs its hooks and a forward pass of the instance, which must not run a second time.
        new.__dict__.pop("forward", None)
        new.__dict__.update({name: OrderedDict() for name in _CALL_HOOKS}, _is_full_backward_hook=None)
        # In `__dict__` and not as a submodule, whose parameters would be found twice.
        new.__dict__["_block"] = module
        # A subclass, so that the block still has its type and attributes.
        kinds = (type(module),) if isinstance(module, _Block) else (_Block, type(module))
        new.__class__ = type(type(module).__name__, kinds, {})
        _register(new)
        return new
    children = {key: child and _copy(child, blocks, copies) for key, child in module._modules.items()}
    new.__dict__["_modules"] = children
    return new


# A compiled graph can contain integers, but not modules, so blocks are found by an integer.
_BLOCK_IDS = count()
_BLOCKS: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()
# The positions of the buffers that a block writes, by its number and its flag `training`, from its first call.
_WRITTEN: dict[tuple[int, bool], set[int]] = {}
_CALL_HOOKS = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_pre_hooks", "_backward_hooks"),
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
)


def _register(block: nn.Module) -> None:
    block_id = block.__dict__["_block_id"] = next(_BLOCK_IDS)
    _BLOCKS[block_id] = block.__dict__["_block"]


class _Block(nn.Module):
    _block: nn.Module
    _block_id: int

    # What a subclass of `nn.Module` does in its call, `_block` does.
    __call__ = nn.Module.__call__

    @property
    def training(self) -> bool:
        """Whether the block trains, which is a flag of the module that is computed."""
        return self._block.training

    @training.setter
    def training(self, mode: bool) -> None:
        self._block.training = mode

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _register(self)  # a copy computes the module that was copied with it

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        params = {name: tuple(leaf) if isinstance(leaf, LowRank) else leaf for name, leaf in params_of(self).items()}
        inputs = (params, dict(self.named_buffers()), args, kwargs)
        device_type = next((leaf.device.type for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)), "cpu")
        return _recompute(self._block_id, self.training, inputs, autocast_now(device_type), fallback_of(self))


# Dynamo fails on an autograd Function that calls `torch.func.vjp` under `torch.func`. With `allow_in_graph`,
# AOTAutograd traces it instead.
@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _recompute(
    block_id: int, training: bool, inputs: tuple[Any, ...], autocast: Autocast | None, fallback: Fallback
) -> Any:
    """Run a block so that it is recomputed in the backward pass.

    `inputs` are the parameters, buffers, arguments and keyword arguments of the block.
    """
    block, caller = _BLOCKS[block_id], current_caller()
    if forward_levels() or not torch.is_grad_enabled():  # a Function has tangents of one level at most
        return _run_block(block, inputs, autocast, fallback, caller)
    leaves, structure = tree_flatten(inputs)
    # `run` outlives this call, and must not keep the tensors that the Function saves.
    constants = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    refuse_hidden_gradients(block, constants)
    written = _WRITTEN.get((block_id, training))
    watch = RefuseRandom(block) if written is None else nullcontext()
    results: list[Any] = []  # what the block returns, without its tensors
    structures: list[Any] = []

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        filled = tree_unflatten(_filled(constants, tensors), structure)
        with watch, refuse_changes(block, filled[2:]):
            output = _run_block(block, filled, autocast, fallback, caller)
        outputs, output_structure = tree_flatten(output)
        refuse_hidden_results(block, outputs)
        results[:] = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in outputs]
        structures[:] = [output_structure]
        return tuple(without_alias(leaf, tensors) for leaf in outputs if isinstance(leaf, Tensor))

    def run_again(*tensors: Tensor) -> tuple[Tensor, ...]:
        output = run(*tensors)
        refuse_attached_attributes(block)
        return output

    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    params, buffers, *arguments = (sum(isinstance(leaf, Tensor) for leaf in tree_leaves(part)) for part in inputs)
    if written is None:
        before = Before(tensors, range(params, params + buffers))
        before.note(params + at for at in running_statistics(block, list(inputs[1])))
    else:
        before = Before(tensors, written)
        before.note(written)
    output = Recomputed.apply(run_again, before, sum(arguments), *tensors)  # type: ignore[no-untyped-call]
    changed = before.changed()
    refuse_written(block, list(inputs[1]), [at - params for at in changed if at not in before.copies])
    _WRITTEN.setdefault((block_id, training), changed)
    return tree_unflatten(_filled(results, output), structures[0])


_TENSOR = object()  # the place of a tensor among the leaves of a tree


def _filled(leaves: Sequence[Any], tensors: Iterable[Tensor]) -> list[Any]:
    """Return the leaves of a tree with tensors in their places."""
    remaining = iter(tensors)
    return [next(remaining) if leaf is _TENSOR else leaf for leaf in leaves]


def _run_block(
    block: nn.Module,
    inputs: Sequence[Any],
    autocast: Autocast | None,
    fallback: Fallback,
    caller: Caller | None,
) -> Any:
    params, *buffers_and_arguments = inputs
    params = {name: LowRank(*leaf) if isinstance(leaf, tuple) else leaf for name, leaf in params.items()}
    with torch.autocast(*autocast) if autocast else nullcontext():
        return call_with(block, params, *buffers_and_arguments, fallback=fallback, caller=caller)
