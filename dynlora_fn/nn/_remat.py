"""`remat` and `checkpoint_contexts`: recompute blocks in the backward pass."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import compress, count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from dynlora_fn._core._check import check_module
from dynlora_fn._core._dtypes import Autocast, autocast_now
from dynlora_fn._core._patterns import match
from dynlora_fn._core._torch import (
    are_transforms_active,
    forward_levels,
    is_batched_gradient,
    is_traced,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
    without_dead_levels,
)
from dynlora_fn._core._types import LowRank
from dynlora_fn.compile._ops import late
from dynlora_fn.nn._block_refusals import RefuseRandom, refuse_attached_attributes
from dynlora_fn.nn._call import call_with
from dynlora_fn.nn._swap import slots_of, swapped
from dynlora_fn.nn._turns import current_caller, taking_turns
from dynlora_fn.nn._view import Fallback
from dynlora_fn.nn._weight import fallback_of, params_of


def remat(model: nn.Module, blocks: Sequence[str]) -> nn.Module:
    """Return a model whose `blocks` save only their inputs for the backward pass.

    Values, gradients and parameter names stay the same.

    The activations of a block are freed after the forward pass and computed once more in the backward pass. This takes
    the time of one more forward pass, and only the activations of one block are in memory at a time (arXiv:1604.06174).
    It works under `torch.func.grad`, which refuses `torch.utils.checkpoint`, with `torch.autograd.grad`, and inside one
    compiled graph. In forward mode, blocks are computed once and save their activations.

    In a compiled step, the recomputation of a block waits for all gradients of the block after it. Inductor keeps some
    freed memory for later tensors of the same size. ``compile_step(..., options={"allow_buffer_reuse": False})`` frees
    it at once: the peak memory is up to a tenth lower, at some cost in time.

    In a compiled graph a block is traced once for training and once for evaluation. Except for `training`, the
    attributes of the module that its forward pass reads must not change.

    Args:
        model: The model, which is not changed. Pass the result to `call` instead of the model:
            ``call(remat(model, ["layers.*"]), params, x)``. Both share parameters and buffers.
        blocks: Names or globs of submodules, as in `nn.Module.named_modules`. Each of these must return a tensor or a
            tuple of tensors.

    Returns:
        A copy of the model, with the same tensors.

    Raises:
        TypeError: If `model` is not a module, or `blocks` is not a list of names or globs.
        ValueError: If a pattern matches no submodule.
        NotImplementedError: In a call of the model, if a block draws random numbers, since they would differ in the
            recomputation. This is checked at the first call in training and in evaluation. Also if an attribute of a
            block that is not a parameter or buffer is differentiated, because its gradient would be lost.

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
        # A subclass of the module's type, so that `isinstance` and attributes work as before.
        new.__class__ = type(type(module).__name__, (_Block, type(module)), {})
        # In `__dict__`, because the parameters of a submodule would be found twice.
        block_id = next(_BLOCK_IDS)
        new.__dict__.update(_block=module, _block_id=block_id)
        _BLOCKS[block_id] = module
        return new
    children = {key: child and _copy(child, blocks, copies) for key, child in module._modules.items()}
    new.__dict__["_modules"] = children
    return new


def checkpoint_contexts(model: nn.Module) -> Callable[[], tuple[AbstractContextManager[None], ...]]:
    """Return the `context_fn` of `torch.utils.checkpoint` for a model under `call`.

    With this `context_fn`, recomputed blocks use the parameters of the call. Otherwise a checkpoint recomputes its
    block after `call` has returned, with the original parameters of the module. The gradient is then wrong, without an
    error.

    For Hugging Face models, under ``value_and_grad(..., via="autograd")``::

        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": dl.checkpoint_contexts(model)})

    `remat` does not need this, and also works under `torch.func` and in compiled steps.

    Args:
        model: The model that is passed to `call`.

    Returns:
        A function that returns the contexts for the forward pass and for the recomputation.

    Raises:
        TypeError: If `model` is not a module.

    Example:
        >>> len(checkpoint_contexts(nn.Linear(4, 4))())
        2
    """

    check_module("model", model)

    def contexts() -> tuple[AbstractContextManager[None], ...]:
        return nullcontext(), _recomputation(model)

    return contexts


def _recomputation(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which the model has its current parameters again."""
    parameters = {slot.name: slot.tensor for slot in slots_of(model) if not slot.is_buffer}
    caller = current_caller()

    @contextmanager
    def context() -> Iterator[None]:
        with taking_turns(model, caller), swapped(slots_of(model), parameters):
            yield

    return context()


# A compiled graph can contain integers, but not modules, so blocks are found by an integer.
_BLOCK_IDS = count()
_WATCHED: set[tuple[int, bool]] = set()
_BLOCKS: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()


class _Block(nn.Module):
    _block: nn.Module
    _block_id: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        params = {name: tuple(leaf) if isinstance(leaf, LowRank) else leaf for name, leaf in params_of(self).items()}
        device_type = next(leaf.device.type for leaf in tree_leaves((params, args)) if isinstance(leaf, Tensor))
        buffers = dict(self.named_buffers())
        inputs = (params, buffers, args, kwargs)
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
    leaves, structure = tree_flatten(inputs)
    is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
    # `run` outlives this call, so it must not keep the tensors alive that the Function saves.
    constants = [None if tensor else leaf for leaf, tensor in zip(leaves, is_tensor, strict=True)]
    block, caller = _BLOCKS[block_id], current_caller()
    watch = nullcontext() if (block_id, training) in _WATCHED else RefuseRandom(block)

    def run(*tensors: Tensor) -> Any:
        remaining = iter(tensors)
        filled = [next(remaining) if tensor else leaf for leaf, tensor in zip(constants, is_tensor, strict=True)]
        params, *buffers_and_arguments = tree_unflatten(filled, structure)
        params = {name: LowRank(*leaf) if isinstance(leaf, tuple) else leaf for name, leaf in params.items()}
        with torch.autocast(*autocast) if autocast else nullcontext(), watch:
            return call_with(block, params, *buffers_and_arguments, fallback=fallback, caller=caller)

    def run_again(*tensors: Tensor) -> Any:
        output = run(*tensors)
        refuse_attached_attributes(block)
        return output

    tensors = compress(leaves, is_tensor)
    if forward_levels():  # a Function supports tangents of only one level
        output = run(*tensors)
    else:
        argument_count = sum(isinstance(leaf, Tensor) for leaf in tree_leaves(inputs[2:]))
        output = _Recomputed.apply(run_again, argument_count, *tensors)  # type: ignore[no-untyped-call]
    _WATCHED.add((block_id, training))
    return output


class _Recomputed(torch.autograd.Function):
    """Compute ``run(*tensors)`` and save only the tensors.

    The backward pass computes it again. The last `argument_count` tensors are arguments of the call, and the others
    parameters and buffers.
    """

    @staticmethod
    def forward(run: Callable[..., Any], argument_count: int, *tensors: Tensor) -> Any:
        return run(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.run, ctx.argument_count, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # `torch.func.vjp` does not accept tensors that were saved inside a transform that has ended.
        tensors, is_needed = [without_dead_levels(tensor) for tensor in ctx.saved_tensors], ctx.needs_input_grad[2:]
        # `late` makes the arguments depend on a gradient. In one graph of both passes, a compiler could otherwise
        # recompute the block during the forward pass.
        for position in range(len(tensors) - ctx.argument_count, len(tensors)):
            tensors[position] = late(tensors[position], grads[0])

        def run(*differentiated: Tensor) -> Any:
            remaining = iter(differentiated)
            filled = (next(remaining) if needed else t for t, needed in zip(tensors, is_needed, strict=True))
            return ctx.run(*filled)

        pull_back = _pull_back_in_func if _needs_func(grads) else _pull_back
        gradients = iter(pull_back(run, list(compress(tensors, is_needed)), grads))
        return None, None, *(next(gradients) if needed else None for needed in is_needed)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], run: Callable[..., Any], argument_count: int, *tensors: Tensor
    ) -> Any:
        batched = torch.vmap(run, in_dims=in_dims[2:], randomness=info.randomness)
        output = _Recomputed.apply(batched, argument_count, *tensors)  # type: ignore[no-untyped-call]
        return output, tree_map(lambda leaf: 0, output)


def _needs_func(grads: Sequence[Tensor]) -> bool:
    """Return whether the backward pass may be differentiated, mapped or traced.

    For example, `is_grads_batched` of `torch.autograd.grad` maps it.
    """
    if torch.is_grad_enabled() or are_transforms_active() or forward_levels() > 0 or is_traced():
        return True
    return any(is_batched_gradient(grad) for grad in grads)


def _pull_back_in_func(
    run: Callable[..., Any], inputs: Sequence[Tensor], grads: tuple[Tensor, ...]
) -> Sequence[Tensor | None]:
    _, pull_back = torch.func.vjp(run, *inputs)  # type: ignore[misc]
    gradients: tuple[Tensor, ...] = pull_back(grads if len(grads) > 1 else grads[0])
    return gradients


def _pull_back(run: Callable[..., Any], inputs: Sequence[Tensor], grads: tuple[Tensor, ...]) -> Sequence[Tensor | None]:
    """Return the gradients with respect to the inputs of `run`, with autograd.

    Unlike `torch.func.vjp`, autograd frees activations during the backward pass.
    """
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        outputs = run(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    attached = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
    if not attached:
        return [None] * len(inputs)
    outputs, grads = zip(*attached, strict=True)
    return torch.autograd.grad(outputs, inputs, grads, allow_unused=True)
