"""Blocks that keep only their inputs for the backward pass and are computed again in it."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import compress, count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from dynlora_fn._core._dtypes import Autocast, autocast_now
from dynlora_fn._core._torch import TorchDispatchMode, tree_flatten, tree_leaves, tree_map, tree_unflatten
from dynlora_fn._core._tree import match
from dynlora_fn._core._types import LowRank
from dynlora_fn.compile._ops import late
from dynlora_fn.nn._call import call_with, params_of


def remat(model: nn.Module, blocks: Sequence[str]) -> nn.Module:
    """A model of the same values, gradients and parameter names whose `blocks` keep their inputs alone.

    What a block computes is freed after the forward pass and computed again, once, in the backward pass: one more
    forward pass in time for the activations of one block at a time in memory (arXiv:1604.06174). It works under
    `torch.func.grad`, which refuses `torch.utils.checkpoint`, through `torch.autograd.grad`, and inside one compiled
    graph.

    Compiled, a block waits for all gradients of the block after it. Inductor keeps some of the memory that is freed for
    what comes later of the same size: ``compile_step(..., options={"allow_buffer_reuse": False})`` gives it back at
    once, for up to a tenth of the peak and some of the time.

    In a compiled graph a block is traced once for training and once for evaluation: nothing else that its forward pass
    looks up in the module may change.

    Args:
        model: left as it is. The result shares its parameters and buffers, and goes wherever the model went:
            ``call(remat(model, ["layers.*"]), params, x)``.
        blocks: names or globs of its submodules, as `nn.Module.named_modules` has them. They return a tensor or a
            tuple of tensors.

    Raises:
        ValueError: if a pattern matches nothing.
        NotImplementedError: if a block draws random numbers at its first call in training or in evaluation: computed
            again they would be others. Later calls are not watched.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    return _copy(model, "", set(match(modules, blocks, "blocks")))


def _copy(module: nn.Module, name: str, blocks: set[str]) -> nn.Module:
    new = copy.copy(module)
    if name in blocks:
        # A subclass, so that whoever asks for the block's type or attributes finds them.
        new.__class__ = type(type(module).__name__, (_Block, type(module)), {})
        # Not as a submodule, whose parameters would be found twice.
        number = next(_NUMBERS)
        new.__dict__.update(_block=module, _number=number)
        _BLOCKS[number] = module
        return new
    prefix = f"{name}." if name else ""
    children = {key: child and _copy(child, prefix + key, blocks) for key, child in module._modules.items()}
    new.__dict__["_modules"] = children
    return new


def checkpoint_contexts(model: nn.Module) -> Callable[[], tuple[AbstractContextManager[None], ...]]:
    """The `context_fn` of `torch.utils.checkpoint.checkpoint` in a model that is run by `call`.

    A checkpoint computes its block again after `call` has returned, with whatever parameters the module then has. With
    this they are those of the call. For Hugging Face models, under ``value_and_grad(..., via="autograd")``::

        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": dl.checkpoint_contexts(model)})

    `remat` needs nothing of the kind, and works under `torch.func` and compiled as well.

    Args:
        model: that `call` is given.
    """

    def contexts() -> tuple[AbstractContextManager[None], ...]:
        return nullcontext(), _with_parameters(model, dict(model.named_parameters(remove_duplicate=False)))

    return contexts


@contextmanager
def _with_parameters(model: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    before = dict(model.named_parameters(remove_duplicate=False))
    try:
        _set_parameters(model, parameters)
        yield
    finally:
        _set_parameters(model, before)


def _set_parameters(model: nn.Module, parameters: Mapping[str, Any]) -> None:
    for name, parameter in parameters.items():
        prefix, _, own = name.rpartition(".")
        model.get_submodule(prefix)._parameters[own] = parameter


# A compiled graph holds numbers, not modules.
_NUMBERS = count()
_WATCHED: set[tuple[int, bool]] = set()
_BLOCKS: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()


class _Block(nn.Module):
    _block: nn.Module
    _number: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        params = {name: tuple(leaf) if isinstance(leaf, LowRank) else leaf for name, leaf in params_of(self).items()}
        device_type = next(leaf.device.type for leaf in tree_leaves((params, args)) if isinstance(leaf, Tensor))
        buffers = dict(self.named_buffers())
        return _recomputed(self._number, self.training, (params, buffers, args, kwargs), autocast_now(device_type))


# Dynamo fails on such a function under `torch.func`. Left to AOTAutograd, it runs as it is written.
@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _recomputed(number: int, training: bool, inputs: tuple[Any, ...], autocast: Autocast | None) -> Any:
    """`inputs` are all that the block uses: its parameters and buffers, arguments and keyword arguments."""
    leaves, structure = tree_flatten(inputs)
    is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
    # `run` outlives this call, and must not hold what is kept for it.
    constants = [None if is_one else leaf for leaf, is_one in zip(leaves, is_tensor, strict=True)]
    block = _BLOCKS[number]
    watch = nullcontext() if (number, training) in _WATCHED else _RefuseRandom(block)

    def run(*tensors: Tensor) -> Any:
        given = iter(tensors)
        filled = [next(given) if is_one else leaf for leaf, is_one in zip(constants, is_tensor, strict=True)]
        params, *rest = tree_unflatten(filled, structure)
        params = {name: LowRank(*leaf) if isinstance(leaf, tuple) else leaf for name, leaf in params.items()}
        with torch.autocast(*autocast) if autocast else nullcontext(), watch:
            return call_with(block, params, *rest)

    given = sum(isinstance(leaf, Tensor) for leaf in tree_leaves(inputs[2:]))
    output = _Recomputed.apply(run, given, *compress(leaves, is_tensor))  # type: ignore[no-untyped-call]
    _WATCHED.add((number, training))
    return output


class _RefuseRandom(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches a block's operations. Slow in Python, so that it is done once: a graph is traced once as well."""

    def __init__(self, block: nn.Module):
        super().__init__()  # type: ignore[no-untyped-call]
        self.block = block

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and not _has_no_dropout(func, args, kwargs or {}):
            rule = "must draw no random numbers, which would be others when it is computed again"
            raise NotImplementedError(f"a block of `remat` {rule}, got `{func}` in {type(self.block).__name__}")
        return func(*args, **(kwargs or {}))


def _has_no_dropout(func: Any, args: Any, kwargs: Any) -> bool:
    """Attention counts as random whether or not it drops anything."""
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return "dropout_p" in names and not given.get("dropout_p", 0)


class _Recomputed(torch.autograd.Function):
    """``run(*tensors)``, the last so many of which are `given` to the block. Keeps its arguments alone."""

    @staticmethod
    def forward(run: Callable[..., Any], given: int, *tensors: Tensor) -> Any:
        return run(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.run, ctx.given, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors, is_needed = list(ctx.saved_tensors), ctx.needs_input_grad[2:]
        # In one graph of both passes nothing else would keep a compiler from computing the block again at once.
        for number in range(len(tensors) - ctx.given, len(tensors)):
            tensors[number] = late(tensors[number], grads[0])

        def run(*needed: Tensor) -> Any:
            rest = iter(needed)
            return ctx.run(*(next(rest) if is_one else t for t, is_one in zip(tensors, is_needed, strict=True)))

        _, pull_back = torch.func.vjp(run, *compress(tensors, is_needed))  # type: ignore[misc]
        found = iter(pull_back(grads if len(grads) > 1 else grads[0]))
        return None, None, *(next(found) if is_one else None for is_one in is_needed)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], run: Callable[..., Any], given: int, *tensors: Tensor) -> Any:
        batched = torch.vmap(run, in_dims=in_dims[2:], randomness=info.randomness)
        output = _Recomputed.apply(batched, given, *tensors)  # type: ignore[no-untyped-call]
        return output, tree_map(lambda leaf: 0, output)
