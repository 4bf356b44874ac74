"""Search for an example that breaks a promise, and report it."""

import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynlora_fn._core._torch import tree_map
from dynlora_fn._core._types import LowRank, Params
from dynlora_fn.testing._strategies import low_rank_params, plans

Arguments = st.SearchStrategy[Any] | tuple[Any, ...] | Mapping[str, Any] | None


class BrokenPromiseError(AssertionError):
    """A broken promise of a transform. The message gives the promise, what happened, and the smallest example."""


def hold(
    promise: str, check: Callable[..., None], arguments: Arguments, examples: int | None, *, is_slow: bool = False
) -> None:
    """Run a check on examples, and raise for the first that fails.

    Args:
        promise: The promise in words.
        check: A function of the arguments that raises where the promise is broken.
        arguments: A strategy for the arguments, a tuple of them, or a single argument.
        examples: The number of examples to draw. Default None takes it from the hypothesis profile.
        is_slow: Whether examples take too long to shrink them. The first example drawn is the smallest one.

    Raises:
        BrokenPromiseError: If the check raises.
    """
    unwanted = {Phase.explain, *([Phase.shrink] if is_slow else [])}
    phases = [phase for phase in settings().phases if phase not in unwanted]
    if not isinstance(arguments, st.SearchStrategy):
        values = as_tuple(arguments)
        try:
            check(*values)
        except Exception as error:
            raise BrokenPromiseError(_message(promise, error, repr(tree_map(_summary, values)))) from error
        return

    @settings(
        max_examples=examples or settings().max_examples,
        deadline=None,
        database=None,
        phases=phases,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(arguments)
    def example(arguments: Any) -> None:
        check(*as_tuple(arguments))

    try:
        example()
    except Exception as error:
        notes = "\n".join(getattr(error, "__notes__", ()))
        raise BrokenPromiseError(_message(promise, error, notes)) from error


def as_tuple(arguments: Any) -> tuple[Any, ...]:
    """Return the arguments as a tuple. A single argument may itself be a NamedTuple."""
    is_plain = isinstance(arguments, tuple) and not hasattr(arguments, "_fields")
    return arguments if is_plain else (arguments,)


def arguments_of(transform: Callable[..., Any], arguments: Arguments = None, **kinds: Any) -> Arguments:
    """Return `arguments`, or by default a strategy for a weight, or for a weight and a plan for it."""
    if arguments is not None:
        return arguments
    weights = low_rank_params(**kinds)
    if not takes_a_plan(transform):
        return st.tuples(weights)
    return weights.flatmap(lambda param: st.tuples(st.just(param), plans(param)))


def takes_a_plan(transform: Callable[..., Any]) -> bool:
    """Return whether a transform has a second argument without a default.

    Raises:
        TypeError: If it has no argument without a default, or more than two.
    """
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(transform).parameters.values()
    count = sum(parameter.kind in positional and parameter.default is parameter.empty for parameter in parameters)
    if count not in (1, 2):
        raise TypeError(f"`transform` has {count} arguments without a default; take a weight, or a weight and a plan")
    return count == 2


def new_params(result: Any) -> LowRank | Params:
    """Return the new weights from the result of a transform, in which they come first.

    Raises:
        TypeError: If the result has none.
    """
    if isinstance(result, tuple) and not isinstance(result, LowRank) and result:
        result = result[0]
    if not isinstance(result, LowRank | Mapping):
        raise TypeError(
            f"`transform` returns {type(result).__name__}; return the new weight, or a tuple that starts with it"
        )
    return result


def weights_of(params: LowRank | Params) -> dict[str, LowRank]:
    """Return the low-rank weights by name. A single weight gets the name ''."""
    named = params if isinstance(params, Mapping) else {"": params}
    return {name: param for name, param in named.items() if isinstance(param, LowRank)}


def _message(promise: str, error: Exception, example: str) -> str:
    example = example.removeprefix("Failing test case: ").removeprefix("Falsifying example: ")
    description = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
    parts = {"promised": promise, "happened": description or type(error).__name__, "smallest example": example}
    return "\n" + "\n".join(f"{name}: {textwrap.indent(text.strip(), '  ').strip()}" for name, text in parts.items())


def _summary(leaf: Any) -> Any:
    is_long = isinstance(leaf, Tensor) and leaf.numel() > 8
    return f"{tuple(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}" if is_long else leaf
