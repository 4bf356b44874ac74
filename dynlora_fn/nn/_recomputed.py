"""An autograd Function that computes a block again in the backward pass."""

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from dynlora_fn._core._torch import (
    are_transforms_active,
    forward_levels,
    is_batched_gradient,
    is_traced,
    tree_map,
    without_dead_levels,
)
from dynlora_fn.compile._ops import late
from dynlora_fn.nn._block_refusals import Before


class Recomputed(torch.autograd.Function):
    """Compute ``run(*tensors)`` and save only the tensors.

    Of a buffer that `run` writes, the value from before is saved, and a copy is written when `run` is computed again.
    The last `argument_count` of the tensors are call arguments.
    """

    @staticmethod
    def forward(run: Callable[..., Any], before: Before, argument_count: int, *tensors: Tensor) -> Any:
        return run(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.run, before, ctx.argument_count, *tensors = inputs
        ctx.written = [at for at in before.changed() if at in before.copies]
        for at in ctx.written:
            tensors[at] = before.copies[at]
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # `torch.func.vjp` inside a pullback does not take what a transform that has ended saved.
        tensors, is_needed = [without_dead_levels(tensor) for tensor in ctx.saved_tensors], ctx.needs_input_grad[3:]
        first_grad = next(grad for grad in grads if grad is not None)
        # `late` makes the arguments depend on a gradient. In one graph of both passes, a compiler could otherwise
        # recompute the block during the forward pass.
        for position in range(len(tensors) - ctx.argument_count, len(tensors)):
            tensors[position] = late(tensors[position], first_grad)
        for position in ctx.written:
            tensors[position] = tensors[position].clone()

        def run(*differentiated: Tensor) -> Any:
            remaining = iter(differentiated)
            filled = (next(remaining) if needed else t for t, needed in zip(tensors, is_needed, strict=True))
            return tuple(compress(ctx.run(*filled), is_differentiable))

        is_differentiable = [grad is not None and grad.dtype.is_floating_point | grad.is_complex() for grad in grads]
        outgoing: tuple[Tensor, ...] = tuple(grad for grad in compress(grads, is_differentiable) if grad is not None)
        pull_back = _pull_back_in_func if _needs_func(outgoing) else _pull_back
        gradients = iter(pull_back(run, list(compress(tensors, is_needed)), outgoing))
        return None, None, None, *(next(gradients) if needed else None for needed in is_needed)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        run: Callable[..., Any],
        before: Before,
        argument_count: int,
        *tensors: Tensor,
    ) -> Any:
        batched = torch.vmap(run, in_dims=in_dims[3:], randomness=info.randomness)
        output = Recomputed.apply(batched, before, argument_count, *tensors)  # type: ignore[no-untyped-call]
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
    gradients: tuple[Tensor, ...] = pull_back(grads)
    return gradients


def _pull_back(run: Callable[..., Any], inputs: Sequence[Tensor], grads: tuple[Tensor, ...]) -> Sequence[Tensor | None]:
    """Return the gradients with respect to the inputs of `run`, with autograd.

    Unlike `torch.func.vjp`, autograd frees activations during the backward pass.
    """
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        outputs = run(*inputs)
    attached = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
    if not attached:
        return [None] * len(inputs)
    outputs, grads = zip(*attached, strict=True)
    return torch.autograd.grad(outputs, inputs, grads, allow_unused=True)
