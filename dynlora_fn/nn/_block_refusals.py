"""Refuse blocks of `remat` whose recomputation would differ or drop a gradient."""

from typing import Any

import torch
from torch import Tensor, nn

from dynlora_fn._core._attached import is_attached
from dynlora_fn._core._torch import TorchDispatchMode


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
