"""Private names of torch are used in `_core/_torch.py` only, and names of torchao in `bases/_torchao.py` only."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import dynlora_fn

PACKAGE = Path(dynlora_fn.__file__).parent
TORCH, TORCHAO = PACKAGE / "_core" / "_torch.py", PACKAGE / "bases" / "_torchao.py"
MODULES = sorted(PACKAGE.rglob("*.py"))


def names_read(source: str) -> set[str]:
    """Return the full names that a module imports, or reads as attributes of what it imports."""
    tree = ast.parse(source)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    bindings = dict(binding for node in imports for binding in _bindings(node))
    read = {name for node in imports for name in _imported(node)}
    for node in ast.walk(tree):
        path = _by_string(node) if isinstance(node, ast.Call) else _dotted(node)
        if path:
            first, *rest = path.split(".")
            read.add(".".join([bindings.get(first, first), *rest]))
    return read


def _imported(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
    yield from (f"{prefix}{alias.name}" for alias in node.names)


def _bindings(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str]]:
    """Yield each name that an import binds, with the full name that it is bound to."""
    for alias, name in zip(node.names, _imported(node), strict=True):
        if alias.asname or isinstance(node, ast.ImportFrom):
            yield alias.asname or alias.name, name
        else:
            yield name.split(".")[0], name.split(".")[0]  # `import torch.nn` binds `torch`


def _dotted(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (path := _dotted(node.value)):
        return f"{path}.{node.attr}"
    return None


def _by_string(call: ast.Call) -> str | None:
    """Return the name in `getattr(torch, "_name")` or `import_module("torch._name")`."""
    function, *strings = _dotted(call.func), *(part.value for part in call.args if isinstance(part, ast.Constant))
    if not strings or not isinstance(strings[0], str) or function is None:
        return None
    if function == "getattr":
        return f"{path}.{strings[0]}" if (path := _dotted(call.args[0])) else None
    return strings[0] if function.split(".")[-1] in ("import_module", "__import__") else None


def private_names_of_torch(source: str) -> list[str]:
    return sorted(name for name in names_read(source) if name.startswith("torch.") and _is_private(name))


def _is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


def names_of_torchao(source: str) -> list[str]:
    return sorted(name for name in names_read(source) if name.split(".")[0] == "torchao")


def identify(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", [path for path in MODULES if path != TORCH], ids=identify)
def test_private_names_of_torch_are_imported_from_one_module(path: Path):
    assert not private_names_of_torch(path.read_text()), "import these from `dynlora_fn._core._torch`"


@pytest.mark.parametrize("path", [path for path in MODULES if path != TORCHAO], ids=identify)
def test_names_of_torchao_are_imported_from_one_module(path: Path):
    assert not names_of_torchao(path.read_text()), "import these from `dynlora_fn.bases._torchao`"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch._dynamo", "torch._dynamo"),
        ("import torch.utils._pytree as pytree", "torch.utils._pytree"),
        ("def f():\n    from torch.utils import _pytree", "torch.utils._pytree"),
        ("from torch.utils._pytree import tree_map", "torch.utils._pytree.tree_map"),
        ("from torch.nn.modules.conv import _ConvNd as ConvNd", "torch.nn.modules.conv._ConvNd"),
        ("import torch\ntorch._grouped_mm(x, y)", "torch._grouped_mm"),
        ("import torch\nf = torch.ops._c10d_functional.all_reduce.default", "torch.ops._c10d_functional"),
        ("import torch as t\nt.Tensor._make_subclass(x)", "torch.Tensor._make_subclass"),
        ("from torch import Tensor as T\nT._make_subclass(x)", "torch.Tensor._make_subclass"),
        ("from torch.nn import functional\nfunctional._canonical_mask(x)", "torch.nn.functional._canonical_mask"),
        ("import torch\ngetattr(torch, '_grouped_mm')", "torch._grouped_mm"),
        ("from importlib import import_module\nimport_module('torch._inductor')", "torch._inductor"),
    ],
)
def test_a_private_name_of_torch_is_found(source: str, name: str):
    assert any(found.startswith(name) for found in private_names_of_torch(source)), names_read(source)


@pytest.mark.parametrize(
    "source",
    [
        "from __future__ import annotations\nimport torch\ntorch.__version__",
        "from dynlora_fn._core._torch import tree_map\ntree_map(f, x)",
        "import torch\ntorch.nn.functional.linear(x, y)\nparam._replace(base=x)",
        "getattr(self, '_base')",
    ],
)
def test_other_names_are_accepted(source: str):
    assert not private_names_of_torch(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torchao",
        "def f():\n    from torchao.quantization import PerRow",
        "import importlib\nimportlib.import_module('torchao.optim')",
    ],
)
def test_a_name_of_torchao_is_found(source: str):
    assert names_of_torchao(source)


def test_both_modules_use_such_names():
    assert private_names_of_torch(TORCH.read_text())
    assert names_of_torchao(TORCHAO.read_text())
