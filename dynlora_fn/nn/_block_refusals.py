"""Refuse blocks of `remat` whose recomputation would differ or drop a gradient."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dynlora_fn._core._attached import is_attached
from dynlora_fn._core._torch import (
    NormBase,
    TorchDispatchMode,
    is_functorch_wrapped,
    storage_key,
    tree_flatten,
    unsafe_view,
)


class RefuseRandom(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that refuses random operations in a block.

    It is slow, so only the first call of a block is checked.
    """

    def __init__(self, block: nn.Module):
        super().__init__()  # type: ignore[no-untyped-call]
        self.block = block

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and not _has_no_dropout(func, args, kwargs or {}):
            raise NotImplementedError(
                f"`blocks` has a {type(self.block).__name__} that draws random numbers in `{func}`, which would differ "
                "when it is computed again; set its dropout to 0 or exclude it"
            )
        return func(*args, **(kwargs or {}))


def _has_no_dropout(func: Any, args: Any, kwargs: Any) -> bool:
    """Return whether an operator is an attention with a dropout probability of 0.

    torch tags operators of attention as random even if they drop nothing.
    """
    names = [argument.name for argument in func._schema.arguments]
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    return "dropout_p" in names and not arguments.get("dropout_p", 0)


def refuse_attached_attributes(block: nn.Module) -> None:
    """Refuse attributes through which a gradient would enter or leave a block.

    An `autograd.Function` passes gradients only from its outputs to its arguments.
    """
    for path, module in block.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and is_attached(value):
                raise NotImplementedError(
                    f"`blocks` has a {type(block).__name__} whose attribute {f'{path}.{name}'.lstrip('.')!r} requires "
                    "a gradient or has a tangent, which would be lost; pass it as an argument or register it as a "
                    "parameter, and return what the block computes, or exclude the block"
                )


# --- objects that are no trees, whose tensors a Function does not see


def refuse_hidden_gradients(block: nn.Module, arguments: Sequence[Any]) -> None:
    """Refuse objects with tensors that are differentiated as arguments.

    They are no nodes of a tree, so that a Function does not see their tensors.
    """
    for argument in arguments:
        if any(is_attached(tensor) for tensor in _tensors_inside(argument)):
            raise NotImplementedError(
                f"`blocks` has a {type(block).__name__} that gets a {type(argument).__name__} with a tensor that "
                "requires a gradient or has a tangent, which would be lost; pass tensors in tuples, lists or dicts, "
                "or exclude the block"
            )


def refuse_hidden_results(block: nn.Module, results: Sequence[Any]) -> None:
    """Refuse results with tensors that are no nodes of a tree."""
    for result in results:
        if not isinstance(result, Tensor) and _tensors_inside(result):
            raise NotImplementedError(
                f"`blocks` has a {type(block).__name__} that returns a {type(result).__name__} with tensors, whose "
                "gradients would be lost; return tensors in tuples, lists or dicts, or exclude the block"
            )


@contextmanager
def refuse_changes(block: nn.Module, arguments: Any) -> Iterator[None]:
    """Refuse a block that changes lists, dicts or objects that it gets.

    The caller would not see the first, and the others would be changed again when the block is computed again.
    """
    leaves, structure = tree_flatten(arguments)
    inside = [_tensors_inside(leaf) for leaf in leaves]
    yield
    leaves_now, structure_now = tree_flatten(arguments)
    changed = None if structure_now == structure and _are_same(leaves_now, leaves) else "list or dict"
    for leaf, tensors in zip(leaves, inside, strict=True):
        if changed is None and not _are_same(_tensors_inside(leaf), tensors):
            changed = type(leaf).__name__
    if changed:
        raise NotImplementedError(
            f"`blocks` has a {type(block).__name__} that changes a {changed} that it gets, which would be changed again"
            " when it is computed again; return tensors instead, call a transformer with use_cache=False, or exclude "
            "the block"
        )


def _are_same(left: Sequence[Any], right: Sequence[Any]) -> bool:
    return len(left) == len(right) and all(one is other for one, other in zip(left, right, strict=True))


def _tensors_inside(value: Any) -> list[Tensor]:
    """Return the tensors in the attributes and elements of an object."""
    if value is None or isinstance(value, Tensor | bool | int | float | complex | str | bytes | type):
        return []
    found: list[Tensor] = []
    pending, visited = [value], {id(value)}
    while pending:
        parent = pending.pop()
        children = (
            list(parent.values()) if isinstance(parent, Mapping) else list(getattr(parent, "__dict__", {}).values())
        )
        children += list(parent) if isinstance(parent, list | tuple | set | frozenset) else []
        for child in children:
            if isinstance(child, Tensor):
                found.append(child)
            elif id(child) not in visited and (
                hasattr(child, "__dict__") or isinstance(child, list | tuple | dict | set)
            ):
                visited.add(id(child))
                pending.append(child)
    return found


# --- tensors that are changed in place


class Before:
    """Tensors and their versions before a block runs, with copies of some of them."""

    def __init__(self, tensors: Sequence[Tensor], positions: Collection[int]) -> None:
        self._tensors, self._versions = tensors, [_version(tensor) for tensor in tensors]
        self.copies = {at: tensors[at].clone() for at in positions}
        self._noted: set[int] = set()

    def note(self, positions: Iterable[int]) -> None:
        """Note tensors that are changed, also if their versions do not tell."""
        self._noted.update(positions)

    def changed(self) -> set[int]:
        """Return the positions of the tensors that were changed in place since."""
        versions = zip(self._tensors, self._versions, strict=True)
        return {at for at, (tensor, version) in enumerate(versions) if at in self._noted or _version(tensor) != version}


def running_statistics(block: nn.Module, buffers: Sequence[str]) -> list[int]:
    """Return the positions of the buffers that batch norm writes.

    It does not change their versions.
    """
    found = {id(buffer) for norm in block.modules() if isinstance(norm, NormBase) for buffer in norm.buffers()}
    return [at for at, name in enumerate(buffers) if id(block.get_buffer(name)) in found]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def refuse_written(block: nn.Module, buffers: Sequence[str], positions: Sequence[int]) -> None:
    """Refuse tensors that a block has changed in place.

    Args:
        block: The block.
        buffers: The names of its buffers.
        positions: The positions of the tensors, from the first buffer on.
    """
    for at in positions:
        what = f"its buffer {buffers[at]!r}, but not at its first call" if 0 <= at < len(buffers) else "its argument"
        what = "its parameter" if at < 0 else what
        raise NotImplementedError(
            f"`blocks` has a {type(block).__name__} that changes {what} in place, so that it would be computed again "
            "from other values; compute a new tensor instead, or exclude the block"
        )


def without_alias(output: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """Return an output of a Function that autograd treats as one.

    It does not save an input that is returned. It refuses in-place changes of a view of what only the Function has.
    """
    if any(output is tensor for tensor in inputs):
        return output.view_as(output)
    if type(output) is not Tensor or is_functorch_wrapped(output) or not output._is_view():
        return output
    shares = any(type(t) is Tensor and storage_key(t) == storage_key(output) for t in inputs)
    return output if shares else unsafe_view(output, tuple(output.shape))
