"""Check numbers, choices and flags in arguments.

Every error names the argument and its value, and says what to do. Integers and floats of NumPy are accepted as well as
Python's, but True and False are not accepted as numbers. Checks read only types and Python values, so they add nothing
to a compiled step.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from dynlora_fn._core._dtypes import cast
from dynlora_fn._core._torch import can_read


def described(value: Any) -> str:
    """Return a short description of a value for an error message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:60]}... ({type(value).__name__})"


def check_integer(name: str, value: Any, *, least: int | None = None, of: str | None = None) -> int:
    """Check an integer and return it as a Python int.

    Args:
        name: The name of the argument, for the error message.
        value: The value of the argument.
        least: The smallest integer that is allowed. Default None means any integer.
        of: The name of the parameter that the value belongs to, for the error message.

    Raises:
        TypeError: If `value` is not an integer.
        ValueError: If `value` is less than `least`.
    """
    at_least = "" if least is None else f" of at least {least}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}` is {described(value)}{_of(of)}, which is not an integer; use an integer{at_least}")
    if least is not None and value < least:
        raise ValueError(f"`{name}` is {value}{_of(of)}; use an integer{at_least}")
    return value if isinstance(value, int) else int(value)


def check_number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    finite: bool = True,
    of: str | None = None,
) -> float:
    """Check a real number and return it as a Python int or float.

    Args:
        name: The name of the argument, for the error message.
        value: The value of the argument.
        least: The smallest number that is allowed.
        above: A number that the value must exceed.
        most: The largest number that is allowed.
        below: A number that the value must stay below.
        finite: Whether to refuse infinities.
        of: The name of the parameter that the value belongs to, for the error message.

    Raises:
        TypeError: If `value` is not a real number.
        ValueError: If `value` is NaN, is outside the interval, or is infinite although `finite` is True.
    """
    wanted = _interval(least, above, most, below)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` is {described(value)}{_of(of)}, which is not a real number; use {wanted}")
    number = value if isinstance(value, int | float) else float(value)
    is_inside = (
        number == number  # noqa: PLR0124, NaN differs from itself
        and (least is None or number >= least)
        and (above is None or number > above)
        and (most is None or number <= most)
        and (below is None or number < below)
        and not (finite and number in (math.inf, -math.inf))
    )
    if not is_inside:
        raise ValueError(f"`{name}` is {value}{_of(of)}; use {wanted}")
    return number


def _interval(least: float | None, above: float | None, most: float | None, below: float | None) -> str:
    """Describe the numbers of an interval for an error message."""
    if (least, above, most, below) == (None, None, None, None):
        return "a finite number"
    if most is None and below is None:
        return f"a number above {above}" if least is None else f"a number of at least {least}"
    if least is not None and most is not None:
        return f"a number from {least} to {most}"
    start, end = ("(", above) if least is None else ("[", least)
    return f"a number in {start}{end}, {below})" if most is None else f"a number in {start}{end}, {most}]"


def check_rate(name: str, value: Any, *, most: float | None = None, of: str | None = None) -> float | Tensor:
    """Return a rate, as `plain_rate`: a number of at least 0, or a 0-d tensor.

    The value of a tensor is not read. A rate that changes between the calls of a compiled step must be a tensor.

    Raises:
        TypeError: If the rate is neither a real number nor a real tensor.
        ValueError: If a number is outside the interval, or a tensor is not 0-d.
    """
    if not isinstance(value, Tensor):
        return check_number(name, value, least=0, most=most, of=of)
    if value.ndim:
        raise ValueError(f"`{name}` has shape {tuple(value.shape)}{_of(of)}; use a number or a 0-d tensor")
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"`{name}` is {described(value)}{_of(of)}; use a real number or a 0-d tensor of one")
    return plain_rate(value)


def plain_rate(rate: Any) -> float | Tensor:
    """Return a rate as a Python number or a floating tensor.

    An unsigned integer could not be negated, and no tensor can be multiplied by a fraction.
    """
    if isinstance(rate, Tensor):
        return rate if rate.is_floating_point() else rate.to(torch.float32)
    return rate if isinstance(rate, int | float) else float(rate)


def check_step(name: str, step: Any) -> int | Tensor:
    """Check a step and return it: an integer of at least 0, or a 0-d int64 tensor.

    A tensor of another integer dtype is converted. Its value is read where the host need not wait for it.

    Raises:
        TypeError: If the step is not an integer.
        ValueError: If the step is negative, or a tensor that is not 0-d.
    """
    if not isinstance(step, Tensor):
        return check_integer(name, step, least=0)
    if step.ndim:
        raise ValueError(f"`{name}` has shape {tuple(step.shape)}; use an integer or a 0-d int64 tensor")
    if step.is_floating_point() or step.is_complex() or step.dtype == torch.bool:
        raise TypeError(f"`{name}` is {described(step)}; use an integer or a 0-d int64 tensor")
    if can_read(step):
        check_integer(name, step.item(), least=0)
    return cast(step, torch.int64)  # a narrow integer would overflow in products


def check_choice(name: str, value: Any, choices: Sequence[str], *, or_none: bool = False) -> None:
    """Raise ValueError if a value is not one of the choices.

    With `or_none`, None is a choice too.
    """
    if (value is None and or_none) or (isinstance(value, str) and value in choices):
        return
    words = [*map(repr, choices), *(["None"] if or_none else [])]
    raise ValueError(f"`{name}` must be {', '.join(words[:-1])} or {words[-1]}, got {described(value)}")


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError if a value is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` is {described(value)}; use True or False")


def check_dtype(name: str, value: Any, *, or_none: bool = False) -> None:
    """Raise TypeError if a value is not a floating dtype of at least 16 bits."""
    if value is None and or_none:
        return
    if not (isinstance(value, torch.dtype) and value.is_floating_point and value.itemsize > 1):
        raise TypeError(
            f"`{name}` is {described(value)}; use a floating dtype of at least 16 bits, such as torch.float32"
        )


def check_device(name: str, value: Any, *, or_none: bool = False) -> None:
    """Raise if a value is neither a device nor the name of one.

    Raises:
        TypeError: If the value is neither a device nor a string.
        ValueError: If the string does not name a device.
    """
    if isinstance(value, torch.device) or (value is None and or_none):
        return
    if not isinstance(value, str):
        raise TypeError(f"`{name}` is {described(value)}; use a device, such as 'cpu'")
    try:
        torch.device(value)
    except RuntimeError as error:
        raise ValueError(f"`{name}` is {value!r}, which is not a device; use one such as 'cpu' or 'cuda:0'") from error


def check_path(name: str, value: Any) -> None:
    """Raise TypeError if a value is not a path."""
    if not isinstance(value, str | PathLike):
        raise TypeError(f"`{name}` is {described(value)}; pass a path")


def check_module(name: str, value: Any) -> None:
    """Raise TypeError if a value is not a module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"`{name}` is {described(value)}; pass an nn.Module")


def check_callable(name: str, value: Any) -> None:
    """Raise TypeError if a value cannot be called."""
    if not callable(value):
        raise TypeError(f"`{name}` is {described(value)}; pass a function")


def check_by_name(name: str, value: Any, *, of: str) -> None:
    """Raise ValueError if a value is not a dict with strings as keys."""
    if not isinstance(value, Mapping):
        raise ValueError(f"`{name}` must be by parameter name, got {_kind(value)}; pass a dict of {of}")
    if torch.compiler.is_dynamo_compiling():
        return  # tracing a check takes as long as tracing an operation
    for key in value:
        if not isinstance(key, str):
            raise ValueError(f"`{name}` has the key {described(key)}, which is not a name; use names of parameters")


def check_patterns(name: str, value: Any) -> None:
    """Raise TypeError if a value is not a sequence or set of names and globs.

    A single string is refused, because its characters would be read as patterns.
    """
    if isinstance(value, str) or not isinstance(value, Sequence | set | frozenset):
        raise TypeError(f"`{name}` is {described(value)}; pass a list of names or globs")
    for pattern in value:
        if not isinstance(pattern, str):
            raise TypeError(f"`{name}` contains {described(pattern)}; use names or globs")


def first_names(names: Iterable[str]) -> str:
    """Return the first four names as one string for an error message."""
    names = [repr(name) for name in names]
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _kind(value: Any) -> str:
    """Describe a value that is not a dict, such as "a single Plan"."""
    return f"a single {type(value).__name__}" if hasattr(value, "_fields") else described(value)


def _of(name: str | None) -> str:
    return "" if name is None else f" for {name!r}"
