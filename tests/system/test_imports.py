"""Which package imports which, and what importing does: nothing."""

import ast
import inspect
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import dynlora_fn

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "dynlora_fn"
# The packages that the modules of each package may import. A new package gets a row.
ALLOWED = {
    "_core": set(),
    "bases": {"_core"},
    "compile": {"_core", "bases"},
    "optim": {"_core", "bases"},
    "parallel": {"_core", "bases"},
    "switching": {"_core", "bases"},
    "nn": {"_core", "bases", "compile", "switching"},
    "interop": {"_core", "bases", "nn", "optim", "parallel", "switching"},
    "testing": {"_core", "bases", "compile", "interop", "nn", "optim", "parallel", "switching"},
}
MODULES = sorted(path for path in PACKAGE.glob("*/*.py") if path.name != "__init__.py")
FACES = sorted(PACKAGE.glob("*/__init__.py"))
NAMESPACES = ["bases", "interop", "nn", "optim", "parallel", "schedules", "switching"]


def imported(source: str) -> set[str]:
    """Return full names of everything that is imported, inside functions and under TYPE_CHECKING too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def of_package(source: str) -> list[list[str]]:
    """Return the imported names of the package, split at the dots."""
    return [name.split(".") for name in imported(source) if name.split(".")[0] == "dynlora_fn"]


def name_of(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts)


def circle_in(paths: list[Path], root: Path) -> list[str] | None:
    """Return the modules of one circle of imports, or None if there is none."""
    modules = {name_of(path, root): path for path in paths}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        found = [f"{full_name}." for full_name in imported(path.read_text())]
        graph[name] = {module for module in modules if any(each.startswith(f"{module}.") for each in found)}
    try:
        TopologicalSorter({name: sources - {name} for name, sources in graph.items()}).prepare()
    except CycleError as error:
        return list(error.args[1])
    return None


def test_every_package_has_a_row_and_a_page():
    packages = {path.parent.name for path in FACES}
    assert packages == {*ALLOWED}
    assert all((PACKAGE / name / "README.md").is_file() for name in packages)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_modules_are_private_and_import_what_lies_below_them(path: Path):
    assert path.stem.startswith("_")
    for _, package, *rest in of_package(path.read_text()):
        assert package in ALLOWED[path.parent.name] | {path.parent.name}
        assert rest[0].startswith("_"), "modules import each other, not the faces"
    assert not [name for name in imported(path.read_text()) if name.startswith(".") or name == "dynlora_fn"]


@pytest.mark.parametrize("path", FACES, ids=lambda path: path.parent.name)
def test_a_face_exports_names_of_its_package_only(path: Path):
    foreign = {package for _, package, *_ in of_package(path.read_text())} - {path.parent.name}
    # The types of sharded factors and of those with an alpha are in `_core`, because all packages share them.
    assert foreign <= ({"_core"} if path.parent.name in ("parallel", "switching") else set())


@pytest.mark.parametrize("folder", ["dynlora_fn", "models", "bench", "tests"])
def test_no_circle(folder: str):
    assert circle_in(sorted((ROOT / folder).rglob("*.py")), ROOT) is None


def test_a_circle_is_found(tmp_path: Path):
    (tmp_path / "a.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from b import B")
    (tmp_path / "b.py").write_text("def f():\n    import a")
    assert {*(circle_in(sorted(tmp_path.glob("*.py")), tmp_path) or [])} == {"a", "b"}


def test_no_test_imports_another():
    for path in (ROOT / "tests").rglob("*.py"):
        for name in imported(path.read_text()):
            assert not any(part.startswith("test_") for part in name.split(".")[:-1]), (path, name)
            assert not name.startswith("test_"), (path, name)


@pytest.mark.slow
def test_the_kit_is_no_part_of_the_package():
    script = "import sys, dynlora_fn; assert not {'hypothesis', 'dynlora_fn.testing'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_the_reader_of_imports_sees_all_forms():
    source = "import torch, dynlora_fn.nn._call\ndef f():\n    from dynlora_fn._core._tree import match"
    assert sorted(of_package(source)) == [["dynlora_fn", "_core", "_tree", "match"], ["dynlora_fn", "nn", "_call"]]
    assert imported("from . import tree") == {"..tree"}


def test_models_are_plain_torch():
    programs = {"pretrain", "finetune", "guides", "trained.py", "parallel.py", "recipes.py"}
    files = [path for path in (ROOT / "models").rglob("*.py") if programs.isdisjoint(path.relative_to(ROOT).parts)]
    assert files
    for path in files:
        assert not of_package(path.read_text()), path


def exported(path: Path) -> list[ast.alias]:
    return [
        alias for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom) for alias in node.names
    ]


@pytest.mark.parametrize("path", [PACKAGE / "__init__.py", PACKAGE / "schedules.py", *FACES], ids=str)
def test_public_names_are_exported_for_type_checkers(path: Path):
    assert all(alias.asname == alias.name for alias in exported(path))  # `x as x`


def test_the_root_has_what_a_training_loop_types():
    names = [name for name, value in vars(dynlora_fn).items() if name[0] != "_" and not inspect.ismodule(value)]
    assert sorted(names) == sorted(
        alias.name for alias in exported(PACKAGE / "__init__.py") if alias.name not in NAMESPACES
    )
    assert len(names) <= 26


def public_values() -> list[tuple[str, object]]:
    modules = [dynlora_fn, *(import_module(f"dynlora_fn.{name}") for name in [*ALLOWED, "schedules"])]
    return sorted(
        {
            (f"{module.__name__}.{name}", value)
            for module in modules
            for name, value in vars(module).items()
            if name[0] != "_" and (inspect.isclass(value) or inspect.isfunction(value))
        },
        key=lambda pair: pair[0],
    )


@pytest.mark.parametrize(("name", "value"), public_values(), ids=lambda value: value if isinstance(value, str) else "")
def test_public_names_have_a_docstring(name: str, value: object):
    if inspect.isclass(value):  # from the source, since a NamedTuple makes one up
        docstring = ast.get_docstring(ast.parse(inspect.getsource(value)).body[0])
    else:
        docstring = inspect.getdoc(value)
    assert docstring, f"`{name}` must say what it is"


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, value in public_values() if inspect.isfunction(value)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_public_functions_have_an_example(name: str, value: object):
    assert ">>> " in inspect.getdoc(value), f"`{name}` must show its guarantee in an example that runs"


@pytest.mark.slow
def test_importing_has_no_side_effects():
    """In a fresh process, no setting of torch changes and no random number is drawn."""
    script = """
import torch

def settings():
    return (
        torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads(), torch.get_num_interop_threads(),
        torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(), torch.initial_seed(), torch.get_rng_state().tolist(),
        torch.cuda.is_initialized(),
    )

torch.manual_seed(0)
before = settings()
import dynlora_fn
assert settings() == before, (settings(), before)
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
