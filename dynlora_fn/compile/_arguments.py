"""The arguments of a compiled step by name, and which of them recompile it."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dynlora_fn._core._torch import keystr, tree_flatten_with_path

_AS_TENSOR = "pass a tensor in place of a Python value that changes"
_AS_SHAPE = (
    "pad tensors to a few shapes, mark the axis that changes with `torch._dynamo.mark_dynamic`, or compile with "
    "dynamic=True"
)


def named_leaves(step: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves of all arguments by path, such as ``batch['tokens']``."""
    try:
        arguments: Mapping[str, Any] = inspect.signature(step).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):  # a function without a signature, or other arguments than it takes
        arguments = {"args": args, **kwargs}
    return {
        name + keystr(path): leaf
        for name, argument in arguments.items()
        for path, leaf in tree_flatten_with_path(argument)[0]
    }


class Calls:
    """Descriptions of the arguments of each call that was compiled.

    A description has what the graph depends on: the value of a Python object, or shape, dtype and layout of a tensor.
    """

    def __init__(self, step: Callable[..., Any]):
        self._step = step
        self._compiled: list[dict[str, str]] = []

    def note(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Record the arguments of a call that Dynamo compiles, once even if traced again."""
        described = self._described(args, kwargs)
        if described not in self._compiled:
            self._compiled.append(described)

    def problem(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """Return the error message for a call that exceeds torch's limit of graphs.

        The message names the arguments that change, and says what to do.
        """
        leaves, calls = named_leaves(self._step, args, kwargs), [*self._compiled, self._described(args, kwargs)]
        names = list(dict.fromkeys(name for call in calls for name in call))
        values = {name: list(dict.fromkeys(call.get(name, "absent") for call in calls)) for name in names}
        changing = {name: texts for name, texts in values.items() if len(texts) > 1}
        text = f"`step` was compiled {len(self._compiled)} times, and torch allows no more"
        if not changing:
            return (
                f"{text}, and its arguments have not changed; find the cause with TORCH_LOGS=recompiles, such as a"
                " global value that the step reads, and pass it as an argument"
            )
        are_tensors = [isinstance(leaves.get(name), Tensor) for name in changing]
        remedies = [_AS_TENSOR] * (not all(are_tensors)) + [_AS_SHAPE] * any(are_tensors)
        changes = "; ".join(f"`{name}` was {_some(texts)}" for name, texts in list(changing.items())[:4])
        return f"{text}: {changes}; {', or '.join(remedies)}, or raise `torch._dynamo.config.recompile_limit`"

    def _described(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, str]:
        return {name: _describe(leaf) for name, leaf in named_leaves(self._step, args, kwargs).items()}


def _describe(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return repr(leaf)[:80]
    grad = ", requires_grad=True" if leaf.requires_grad else ""
    layout = "" if leaf.is_contiguous() else f", stride={leaf.stride()}"
    return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)} on {leaf.device}{layout}{grad}"


def _some(texts: list[str]) -> str:
    return ", ".join(texts) if len(texts) <= 4 else f"{', '.join(texts[:3])}, ..., {texts[-1]}"
