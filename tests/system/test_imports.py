"""Who imports whom, and what importing does: nothing."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import dynlora_fn

ROOT = Path(__file__).parents[2]
MODULES = sorted(path for path in (ROOT / "dynlora_fn").glob("*.py") if path.name != "__init__.py")
KIT = sorted((ROOT / "dynlora_fn" / "testing").glob("*.py"))  # on top: it may import all of the others, which none does
FIRST = {"types"}
BELOW = {"types", "tree", "stacking", "basis", "base"}
CODES = {"types", "base", "formats", "opaque_codes"}
# What each module may import of the package. One that is not here is new: give it a place.
ALLOWED = {
    "types": set(),
    "cost": BELOW | {"bases", "paths"},
    "opaque": set(),
    "nodes": {"opaque"},
    "saved": {"nodes"},
    "gathers": {"nodes"},
    "blocks": {"nodes"},
    "inductor": {"blocks", "gathers", "nodes", "opaque", "opaque_codes", "saved"},
    "nf4": FIRST,
    "float4": FIRST,
    "formats": FIRST | {"float4", "nf4"},
    "opaque_codes": FIRST | {"base", "formats"},
    "bases": CODES | {"rows", "shares"},
    "shares": FIRST | {"rows"},
    "rows": FIRST,
    "sharding": FIRST | {"bases", "float4", "shares", "tree"},
    "distributed": FIRST | {"bases", "rows", "sharding"},
    "compensation": FIRST | {"base", "bases", "optim", "spectrum"},
    "quantized": CODES | {"bases"},
    "deferred": FIRST | {"bases"},
    "torchao_prototypes": FIRST,
    "torchao_tensors": CODES | {"bases", "nf4", "stacking", "torchao_prototypes"},
    "memory": {"inductor", "nodes"},
    "consumed": {"base"},
    "step": {"base", "consumed", "inductor"},
    "base": FIRST,
    "tree": FIRST,
    "basis": FIRST,
    "stacking": FIRST,
    "moments": set(),
    "spectrum": set(),
    "optim": FIRST | {"moments", "rows"},
    "multi": FIRST | {"optim"},
    "momentum": FIRST | {"optim"},
    "orthogonalized": FIRST | {"momentum", "optim", "rows", "spectrum"},
    "projection": FIRST | {"moments"},
    "targets": {"tree"},
    "lowrank": BELOW | {"bases"},
    "initial": BELOW | {"bases", "lowrank", "quantized", "sharding", "targets", "torchao_tensors"},
    "paths": set(),
    "contraction": BELOW | {"bases", "formats", "paths", "shares"},
    "views": BELOW | {"bases", "lowrank"},
    "products": BELOW | {"contraction", "views"},
    "reshaping": BELOW | {"products", "views"},
    "rules": BELOW | {"products", "reshaping", "views"},
    "module": BELOW | {"rules", "views"},
    "export": BELOW | {"views"},
    "files": BELOW | {"export"},
    "adapter_layers": FIRST,
    "adapter_reading": BELOW | {"adapter_layers", "files", "initial"},
    "adapter_writing": BELOW | {"adapter_layers", "export", "files", "views"},
    "recompute": BELOW | {"module", "opaque"},
    "schedule": BELOW | {"lowrank"},
    "switching": BELOW | {"bases", "lowrank", "rows"},
    "dither": BELOW | {"lowrank", "schedule", "switching"},
    "pool": BELOW | {"lowrank", "schedule", "switching"},
}


def imported(source: str) -> set[str]:
    """Full names of all that is imported, inside of functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def of_package(source: str) -> set[str]:
    """Modules of the package among them; `from dynlora_fn import x`, by way of the package as a whole, counts as x."""
    return {name.split(".")[1] for name in imported(source) if name.split(".")[0] == "dynlora_fn" and "." in name}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_modules_import_what_lies_below_them(path: Path):
    source = path.read_text()
    assert of_package(source) <= ALLOWED[path.stem]
    assert not [name for name in imported(source) if name.startswith(".") or name == "dynlora_fn"]


@pytest.mark.parametrize("path", KIT, ids=lambda path: path.stem)
def test_the_kit_imports_modules_by_their_full_names(path: Path):
    names = [name for name in imported(path.read_text()) if name.split(".")[0] == "dynlora_fn"]
    assert path.stem == "values" or any(name.startswith("dynlora_fn.testing.") for name in names) or not names
    assert all(of_module(name) in {*ALLOWED, "testing"} for name in names)


def of_module(name: str) -> str:
    return name.split(".")[1]


def test_the_kit_is_no_part_of_the_package():
    script = "import sys, dynlora_fn; assert not {'hypothesis', 'dynlora_fn.testing'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_the_reader_of_imports_sees_all_forms():
    source = (
        "import torch, dynlora_fn.step\nfrom dynlora_fn import pool\ndef f():\n    from dynlora_fn.tree import match"
    )
    assert of_package(source) == {"step", "pool", "tree"}
    assert imported("from . import tree") == {"..tree"}


def test_models_are_plain_torch():
    jobs = {"pretrain", "finetune", "parallel.py", "recipes.py"}  # what trains the models
    files = [path for path in (ROOT / "models").rglob("*.py") if jobs.isdisjoint(path.relative_to(ROOT).parts)]
    assert files
    for path in files:
        assert not [name for name in imported(path.read_text()) if name.split(".")[0] == "dynlora_fn"], path


def public_names() -> list[str]:
    return sorted(name for name, value in vars(dynlora_fn).items() if name[0] != "_" and not inspect.ismodule(value))


def test_all_that_is_public_is_exported_by_name():
    tree = ast.parse((ROOT / "dynlora_fn" / "__init__.py").read_text())
    exported = [alias for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert all(alias.asname == alias.name for alias in exported)  # `x as x`, so that type checkers see them
    assert sorted(alias.name for alias in exported) == public_names()


@pytest.mark.parametrize("name", public_names())
def test_public_names_have_a_docstring(name):
    value = getattr(dynlora_fn, name)
    if inspect.isclass(value) or inspect.isfunction(value):  # an alias of a type has none of its own
        docstring = ast.get_docstring(ast.parse(inspect.getsource(value)).body[0])  # not one that a NamedTuple makes up
        assert docstring, f"`{name}` must say what it is"


def test_importing_has_no_side_effects():
    """In a fresh process: nothing that torch computes by changes, and no random number is drawn."""
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
