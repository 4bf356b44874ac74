"""Search for an example that breaks a promise, and report it."""

import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynlora_fn._core._check import check_callable, check_integer, described
from dynlora_fn._core._torch import tree_map
from dynlora_fn._core._types import LowRank, Params
from dynlora_fn.testing._compare import ExceededBoundError
from dynlora_fn.testing._strategies import low_rank_params, plans

Arguments = st.SearchStrategy[Any] | tuple[Any, ...] | Mapping[str, Any] | None


class BrokenPromiseError(AssertionError):
    """A transform breaks its promise.

    The message gives the promise, and for each kind of failure the smallest example. If a bound was exceeded, it also
    gives the largest breach, which may be in another example.
    """


def hold(
    promise: str, check: Callable[..., None], arguments: Arguments, examples: int | None, *, is_slow: bool = False
) -> None:
    """Run a check on examples, and raise one error that reports all kinds of failure.

    Args:
        promise: The promise in words.
        check: A function of the arguments that raises where the promise is broken.
        arguments: A strategy for the arguments, a tuple of them, or a single argument.
        examples: The number of examples to draw. Default None takes it from the hypothesis profile.
        is_slow: Whether examples take too long to shrink. Only the first failure is then reported.

    Raises:
        BrokenPromiseError: If the check raises.
        TypeError: If `arguments` is neither a strategy, a tuple, a dict nor None, or `examples` is not an integer.
        ValueError: If `arguments` is empty, or `examples` is less than 1.
    """
    examples = None if examples is None else check_integer("examples", examples, least=1)
    _check_arguments(arguments)
    unwanted = {Phase.explain, *([Phase.shrink] if is_slow else [])}
    phases = [phase for phase in settings().phases if phase not in unwanted]
    if not isinstance(arguments, st.SearchStrategy):
        values = as_tuple(arguments)
        try:
            check(*values)
        except Exception as error:
            raise BrokenPromiseError(_message(promise, [(error, _summary(values))])) from error
        return

    largest: list[tuple[ExceededBoundError, str]] = []  # the largest breach, with its example

    @settings(
        max_examples=examples or settings().max_examples,
        deadline=None,
        database=None,
        phases=phases,
        report_multiple_bugs=not is_slow,  # otherwise a bug with a smaller example would hide the others
        suppress_health_check=list(HealthCheck),
    )
    @given(arguments)
    def example(arguments: Any) -> None:
        try:
            check(*as_tuple(arguments))
        except ExceededBoundError as error:
            if not largest or error.breach > largest[0][0].breach:
                largest[:] = [(error, _summary(as_tuple(arguments)))]
            raise

    try:
        example()
    except Exception as error:
        failures = error.exceptions if isinstance(error, ExceptionGroup) else [error]
        smallest = [(failure, "\n".join(getattr(failure, "__notes__", ()))) for failure in failures]
        raise BrokenPromiseError(_message(promise, smallest, largest)) from error


def _check_arguments(arguments: Any) -> None:
    """Raise if a value cannot be the arguments of a transform.

    Without a weight nothing would be checked.
    """
    if isinstance(arguments, st.SearchStrategy | Tensor):
        return
    if not isinstance(arguments, tuple | Mapping):
        raise TypeError(f"`arguments` is {described(arguments)}; pass a strategy, a tuple, or parameters by name")
    if not arguments:
        raise ValueError(f"`arguments` is {arguments!r}, so that nothing would be checked; pass at least one parameter")


def as_tuple(arguments: Any) -> tuple[Any, ...]:
    """Return the arguments as a tuple. A single argument may itself be a NamedTuple."""
    is_plain = isinstance(arguments, tuple) and not hasattr(arguments, "_fields")
    return arguments if is_plain else (arguments,)


def arguments_of(transform: Callable[..., Any], arguments: Arguments = None, **kinds: Any) -> Arguments:
    """Return `arguments`, or by default a strategy for a weight and its plan.

    A transform of one argument gets only the weight.
    """
    check_callable("transform", transform)
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
    """Return the new weights from the result of a transform, which starts with them.

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


def _message(
    promise: str, failures: Sequence[tuple[Exception, str]], largest: Sequence[tuple[Exception, str]] = ()
) -> str:
    parts = [("promised", promise)]
    for error, example in failures:
        arguments = example.removeprefix("Failing test case: ").removeprefix("Falsifying example: ")
        parts += [("happened", _description(error)), ("smallest example", arguments)]
    told = {_description(error) for error, _ in failures}
    parts += [("largest breach", f"{error}\nwith {example}") for error, example in largest if str(error) not in told]
    return "\n" + "\n".join(f"{name}: {textwrap.indent(text.strip(), '  ').strip()}" for name, text in parts)


def _description(error: Exception) -> str:
    text = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
    return text or type(error).__name__


def _summary(values: tuple[Any, ...]) -> str:
    """Return arguments as a text, with shapes in place of long tensors."""
    return repr(tree_map(_short, values))


def _short(leaf: Any) -> Any:
    is_long = isinstance(leaf, Tensor) and leaf.numel() > 8
    return f"{tuple(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}" if is_long else leaf
