"""The shapes in annotations, enforced: ``pytest --shapes``.

Each call of a function of the package is checked against its tensor annotations. Each tuple that goes in or comes out
is checked against the annotations of its fields. Tests that compile are skipped.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, get_type_hints

import jaxtyping
import pytest
import torch
from torch import Tensor


class ShapeError(TypeError):
    """A tensor that does not match its annotation or another tensor."""


def install() -> None:
    """Enforce annotations in all modules of `dynlora_fn` that are not imported yet."""
    jaxtyping.install_import_hook("dynlora_fn", "tests.support.shapes.checked")
    torch.compile, torch.export.export = _skipping_when_called, _skipped


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the checker that jaxtyping calls with each function's arguments.

    It is called again with arguments and result.
    """
    signature = inspect.signature(function)
    hints = {name: _Hint.of(parameter.annotation) for name, parameter in signature.parameters.items()}
    returned = _Hint.of(signature.return_annotation)

    @wraps(function)
    def look(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            _check(f"{function.__qualname__}: {name}", value, hints[name])
        _check(f"{function.__qualname__}: what it returns", result, returned)
        return result

    return look


class _Hint(NamedTuple):
    """An annotation, and the annotations of tensors in it."""

    annotation: Any
    options: list[Any]

    @classmethod
    def of(cls, annotation: Any) -> "_Hint":
        return cls(annotation, _options(annotation))


def _check(what: str, value: Any, hint: _Hint) -> None:
    _look(value)
    if hint.options and isinstance(value, Tensor) and not any(isinstance(value, option) for option in hint.options):
        raise ShapeError(f"{what} must be {hint.annotation}, got {value.dtype} {tuple(value.shape)}")


# Tuples that were checked last, by identity. A weight goes through hundreds of calls, and is checked at the first.
_CHECKED: dict[int, tuple[Any, ...]] = {}
_CHECKED_LIMIT = 64


def _look(value: Any) -> None:
    if isinstance(value, dict):  # reading a lazy mapping would make its weights
        for item in value.values():
            _look(item)
    elif isinstance(value, tuple | list):
        if _CHECKED.get(id(value)) is value:
            return
        is_from_library = type(value).__module__.startswith("dynlora_fn.") and hasattr(value, "_fields")
        if is_from_library and not isinstance(value, _pairs()):
            with jaxtyping.jaxtyped("context"):
                _check_fields(value)
        for item in value:
            _look(item)
        if is_from_library and _is_fixed(value):
            _CHECKED[id(value)] = value
            if len(_CHECKED) > _CHECKED_LIMIT:
                del _CHECKED[next(iter(_CHECKED))]


def _is_fixed(value: Any) -> bool:
    """Return whether a value contains nothing that a later call could find changed."""
    return isinstance(value, Tensor | int | float | str | None) or (
        isinstance(value, tuple) and all(map(_is_fixed, value))
    )


def _check_fields(value: Any) -> None:
    for name in ("factors", "pending"):
        if hasattr(value, name):  # in the same context as their base
            _check_fields(getattr(value, name))
    for name, hint in _hints(type(value)).items():
        field = getattr(value, name)
        if isinstance(field, Tensor) and not any(isinstance(field, option) for option in _options(hint)):
            raise ShapeError(f"{type(value).__name__}.{name} must be {hint}, got {field.dtype} {tuple(field.shape)}")


def _pairs() -> type:
    """Return the type that also contains incoming vectors, counts and masks.

    Only a weight fixes their shapes.
    """
    from dynlora_fn._core._types import Factors  # noqa: PLC0415, once the hook is there

    return Factors


_SEEN: dict[type, dict[str, Any]] = {}


def _hints(kind: type) -> dict[str, Any]:
    if kind not in _SEEN:
        _SEEN[kind] = {name: hint for name, hint in get_type_hints(kind).items() if _options(hint)}
    return _SEEN[kind]


def _options(hint: Any) -> list[Any]:
    """Return the annotations of tensors among the types of a union."""
    parts = getattr(hint, "__args__", None) or [hint]
    return [part for part in parts if isinstance(part, type) and issubclass(part, jaxtyping.AbstractArray)]


def _skipping_when_called(model: Any = None, **_: Any) -> Any:
    """Replace `torch.compile`, with which packages decorate functions.

    They do so when they are imported.
    """
    return _skipped if model is not None else lambda _: _skipped


def _skipped(*_: Any, **__: Any) -> Any:
    pytest.skip("no shapes are enforced in what a compiler traces")
