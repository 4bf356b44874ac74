"""Every private name of torch that the library uses is still where `_core/_torch.py` looks for it."""

import ast
import inspect
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest

from dynlora_fn._core import _torch


def reexported(module: ModuleType) -> list[tuple[str, str]]:
    """Return the module and the name of each import from torch that runs when `module` is imported."""
    statements = [node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.ImportFrom)]
    return [
        (node.module or "", alias.name)
        for node in statements
        for alias in node.names
        if (node.module or "").startswith("torch")
    ]


def lookup(name: str) -> Any:
    """Return the object with this full name, importing modules on the way.

    Raises:
        AttributeError: If there is no such name.
    """
    first, *rest = name.split(".")
    found, path = import_module(first), first
    for part in rest:
        path = f"{path}.{part}"
        if not hasattr(found, part) and isinstance(found, ModuleType):
            try:
                import_module(path)
            except ModuleNotFoundError as error:
                raise AttributeError(f"torch has no {path}, which is part of {name}") from error
        found = getattr(found, part)
    return found


@pytest.mark.parametrize(("module", "name"), reexported(_torch), ids=lambda value: value)
def test_a_reexported_name_is_in_its_module(module: str, name: str):
    assert hasattr(import_module(module), name), f"torch has moved {module}.{name}, which `_core/_torch.py` re-exports"


@pytest.mark.parametrize("name", _torch.LAZY)
def test_a_lazy_name_is_in_its_module(name: str):
    module = _torch.LAZY[name]
    assert hasattr(import_module(module), name), f"torch has moved {module}.{name}, which `_core/_torch.py` imports"
    assert getattr(_torch, name) is getattr(import_module(module), name)


@pytest.mark.parametrize("name", _torch.USED)
def test_a_used_name_can_be_looked_up(name: str):
    try:
        lookup(name)
    except AttributeError as error:
        pytest.fail(f"torch has moved {name}, which `_core/_torch.py` uses: {error}")


def test_imports_for_type_checkers_are_the_lazy_ones():
    (block,) = [node for node in ast.parse(inspect.getsource(_torch)).body if isinstance(node, ast.If)]
    imports = {alias.name: node.module for node in block.body for alias in node.names}  # type: ignore[attr-defined]
    assert imports == _torch.LAZY


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _torch.no_such_name  # noqa: B018
    with pytest.raises(AttributeError, match=r"torch has no torch\.no_such_module"):
        lookup("torch.no_such_module.name")
