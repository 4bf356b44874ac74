"""How a checker looks for an example that breaks a promise, and what it says of one."""

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
    """A transform does not keep a promise. The message says which, what happened, and the smallest example of it."""


def hold(
    promise: str, check: Callable[..., None], arguments: Arguments, examples: int | None, *, is_slow: bool = False
) -> None:
    """Runs the check for examples, and says what breaks.

    Args:
        promise: in words.
        check: of the arguments; raises anything where the promise is broken.
        arguments: a strategy for them, one tuple of them, or the single one there is.
        examples: to draw; as many as the hypothesis profile says unless given.
        is_slow: whether an example takes so long that none is made smaller. The first one drawn is the smallest there
            is.
    """
    unwanted = {Phase.explain, *([Phase.shrink] if is_slow else [])}
    phases = [phase for phase in settings().phases if phase not in unwanted]
    if not isinstance(arguments, st.SearchStrategy):
        given_ones = as_tuple(arguments)
        try:
            check(*given_ones)
        except Exception as error:
            raise BrokenPromiseError(_message(promise, error, repr(tree_map(_summary, given_ones)))) from error
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
    """One argument, which may be a named tuple itself, or several."""
    is_plain = isinstance(arguments, tuple) and not hasattr(arguments, "_fields")
    return arguments if is_plain else (arguments,)


def arguments_of(transform: Callable[..., Any], arguments: Arguments = None, **kinds: Any) -> Arguments:
    """Those given, or a strategy for those that the transform takes: a weight, or a weight and a plan for it."""
    if arguments is not None:
        return arguments
    weights = low_rank_params(**kinds)
    if not takes_a_plan(transform):
        return st.tuples(weights)
    return weights.flatmap(lambda param: st.tuples(st.just(param), plans(param)))


def takes_a_plan(transform: Callable[..., Any]) -> bool:
    """Whether it has a second argument without a default.

    Raises:
        TypeError: if it takes none or more than two.
    """
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(transform).parameters.values()
    count = sum(one.kind in positional and one.default is one.empty for one in parameters)
    if count not in (1, 2):
        raise TypeError(
            f"`transform` must take a weight, or a weight and a plan, got {count} arguments without a default"
        )
    return count == 2


def new_params(result: Any) -> LowRank | Params:
    """Of what a transform returns the new weights, which come first.

    Raises:
        TypeError: if there are none.
    """
    if isinstance(result, tuple) and not isinstance(result, LowRank) and result:
        result = result[0]
    if not isinstance(result, LowRank | Mapping):
        raise TypeError(
            f"a transform must return the new weight, alone or first of several, got {type(result).__name__}"
        )
    return result


def weights_of(params: LowRank | Params) -> dict[str, LowRank]:
    """Low-rank weights by name; one without a name has none."""
    named = params if isinstance(params, Mapping) else {"": params}
    return {name: param for name, param in named.items() if isinstance(param, LowRank)}


def _message(promise: str, error: Exception, example: str) -> str:
    example = example.removeprefix("Failing test case: ").removeprefix("Falsifying example: ")
    what = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
    parts = {"promised": promise, "happened": what or type(error).__name__, "smallest example": example}
    return "\n" + "\n".join(f"{name}: {textwrap.indent(text.strip(), '  ').strip()}" for name, text in parts.items())


def _summary(leaf: Any) -> Any:
    is_long = isinstance(leaf, Tensor) and leaf.numel() > 8
    return f"{tuple(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}" if is_long else leaf
