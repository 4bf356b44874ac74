"""How many small faults in the core the suite notices: ``python -m bench.mutants``.

Each mutant is one change of one expression of one module, made in memory. A process that has imported torch, but not
the package, forks for each: the child imports the package with the mutant in it and runs the module's tests until one
fails. What runs out of time is told apart from what fails and from what passes.
"""

import argparse
import ast
import contextlib
import importlib
import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
# What tests each module first, fast ones before slow ones, and what is not worth its time for a mutant.
TESTS = {
    "basis": ["test_basis", "test_lowrank"],
    "base": ["test_base", "test_switching", "test_lowrank", "test_promises", "test_subclasses"],
    "schedule": ["test_schedule", "test_dither"],
    "lowrank": ["test_lowrank", "test_switching", "test_promises"],
    "switching": ["test_switching", "test_promises", "test_pool"],
    "optim": ["test_optim", "test_moments", "test_projection"],
    "bases": ["test_promises", "test_deferred", "test_quantized"],
}
SLOW = ("inductor", "donated", "growing", "llama", "one_graph", "compiled_equals")
SKIPPED = " and ".join(f"not {name}" for name in SLOW)
PRELOADED = (
    "hypothesis", "hypothesis.stateful", "jaxtyping", "numpy", "opt_einsum", "pytest", "torch", "torch._dynamo",
    "torch._functorch.aot_autograd", "torch._inductor", "torch.distributed", "torch.distributed.tensor", "torchao",
    "torchao.quantization", "torchao.prototype.mx_formats.inference_workflow", "torchao.optim",
)  # fmt: skip


class Mutant(NamedTuple):
    """One change: of the node with this number in the module's tree, in one of the ways there are."""

    module: str
    node: int
    way: int
    line: int
    before: str
    after: str


class Outcome(NamedTuple):
    mutant: Mutant
    how: str  # "killed", "timeout" or "survived"
    seconds: float


# --- what is changed

SWAPS: dict[type, tuple[type, ...]] = {
    ast.Add: (ast.Sub,), ast.Sub: (ast.Add,), ast.Mult: (ast.Div,), ast.Div: (ast.Mult,), ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.Add,), ast.Pow: (ast.Mult,), ast.MatMult: (ast.Mult,), ast.LShift: (ast.RShift,),
    ast.RShift: (ast.LShift,), ast.BitAnd: (ast.BitOr,), ast.BitOr: (ast.BitAnd,), ast.BitXor: (ast.BitOr,),
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,), ast.And: (ast.Or,), ast.Or: (ast.And,),
}  # fmt: skip
NAMES = {
    "any": "all", "all": "any", "min": "max", "max": "min", "amin": "amax", "amax": "amin", "floor": "ceil",
    "ceil": "floor", "zeros_like": "ones_like", "b": "a", "a": "b", "left": "right", "right": "left",
}  # fmt: skip


def changes(node: ast.AST) -> Iterator[ast.AST]:  # noqa: PLR0912, a table
    """All that the node is replaced by, one after the other."""
    if isinstance(node, ast.BinOp | ast.BoolOp):
        for kind in SWAPS.get(type(node.op), ()):
            yield _with(node, op=kind())
    elif isinstance(node, ast.Compare):
        for kind in SWAPS.get(type(node.ops[0]), ()):
            yield _with(node, ops=[kind(), *node.ops[1:]])
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1)
        if node.value:
            yield ast.Constant(0)
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    elif isinstance(node, ast.If):
        yield _with(node, test=ast.Constant(True))
        yield _with(node, test=ast.Constant(False))
    elif isinstance(node, ast.Attribute) and node.attr in NAMES and isinstance(node.ctx, ast.Load):
        yield _with(node, attr=NAMES[node.attr])
    elif isinstance(node, ast.Name) and node.id in NAMES and isinstance(node.ctx, ast.Load):
        yield ast.Name(NAMES[node.id], ast.Load())
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.Pass()


def _with(node: Any, **fields: Any) -> Any:
    return type(node)(**{**{name: getattr(node, name) for name in node._fields}, **fields})


def mutants_of(module: str) -> list[Mutant]:
    tree = ast.parse(source_of(module))
    return [
        Mutant(module, number, way, node.lineno, ast.unparse(node).split("\n")[0], ast.unparse(new).split("\n")[0])
        for number, node in enumerate(_own(tree))
        for way, new in enumerate(changes(node))
    ]


def _own(tree: ast.AST) -> list[Any]:
    """Nodes that do something: neither annotations, overloads, docstrings nor what an error says."""
    found: list[Any] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom | ast.Assert):
            return
        if isinstance(node, ast.FunctionDef) and any("overload" in ast.unparse(one) for one in node.decorator_list):
            return
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "rule":
            return  # of an error
        found.append(node)
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_ignores"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    visit(child)

    visit(tree)
    return found


def mutated(mutant: Mutant) -> str:
    tree = ast.parse(source_of(mutant.module))
    target = _own(tree)[mutant.node]
    new = list(changes(deepcopy(target)))[mutant.way]

    class Replace(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> Any:
            return new if node is target else self.generic_visit(node)

    return ast.unparse(ast.fix_missing_locations(Replace().visit(tree)))


def source_of(module: str) -> str:
    return (ROOT / "dynlora_fn" / f"{module}.py").read_text()


# --- one mutant in a process of its own


class _Loader(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, mutant: Mutant):
        self.name, self.source = f"dynlora_fn.{mutant.module}", mutated(mutant)
        self.path = str(ROOT / "dynlora_fn" / f"{mutant.module}.py")

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        return importlib.util.spec_from_loader(name, self, origin=self.path) if name == self.name else None

    def exec_module(self, module: ModuleType) -> None:
        module.__file__ = self.path
        exec(compile(self.source, self.path, "exec"), module.__dict__)


def _run_tests(mutant: Mutant | None, files: list[str], skipped: str) -> int:
    import pytest  # noqa: PLC0415, preloaded
    from hypothesis import Phase, settings  # noqa: PLC0415

    if mutant is not None:
        sys.meta_path.insert(0, _Loader(mutant))
    phases = [Phase.explicit, Phase.generate]
    settings.register_profile("mutants", deadline=None, max_examples=15, derandomize=True, database=None, phases=phases)
    paths = [str(ROOT / "tests" / f"{name}.py") for name in files]
    options = ["-x", "-q", "-n0", "-k", skipped, "-p", "no:cacheprovider", "--hypothesis-profile", "mutants", "--tb=no"]
    return int(pytest.main([*options, *paths]))


def run(mutant: Mutant | None, files: list[str], skipped: str, seconds: float) -> tuple[str, float]:
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.setsid()
        with contextlib.suppress(BaseException):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            os._exit(_run_tests(mutant, files, skipped))
        os._exit(1)
    while time.monotonic() - start < seconds:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            how = "survived" if os.waitstatus_to_exitcode(status) == 0 else "killed"
            return how, time.monotonic() - start
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout", time.monotonic() - start


# --- all of them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="+", default=[*TESTS], choices=[*TESTS])
    parser.add_argument("--every", type=int, default=1, help="one mutant in so many")
    parser.add_argument("--timeout", type=float, default=90, help="seconds for one mutant")
    parser.add_argument("--again", type=Path, help="run only those that survived by this file")
    parser.add_argument("--slow", action="store_true", help="tests that take long too")
    parser.add_argument("--out", type=Path, help="JSON to write, after every mutant")
    args = parser.parse_args()
    os.chdir(ROOT)
    os.environ |= {"CI": "1", "OMP_NUM_THREADS": "1"}
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    for name in PRELOADED:
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    mutants = [mutant for module in args.modules for mutant in mutants_of(module)][:: args.every]
    if args.again:
        before = json.loads(args.again.read_text())["survived"]
        wanted = {(one["module"], one["line"], one["before"], one["after"]) for one in before}
        mutants = [one for one in mutants if (one.module, one.line, one.before, one.after) in wanted]
    skipped = "not inductor" if args.slow else SKIPPED
    for module in {one.module for one in mutants}:
        how, seconds = run(None, TESTS[module], skipped, 20 * args.timeout)
        print(f"{module}: without a mutant its tests take {seconds:.1f} s", flush=True)
        if how != "survived":
            raise SystemExit(f"the tests of {module} fail without a mutant")
    outcomes = []
    for number, mutant in enumerate(mutants):
        outcomes.append(Outcome(mutant, *run(mutant, TESTS[mutant.module], skipped, args.timeout)))
        if outcomes[-1].how != "killed":
            print(
                number,
                outcomes[-1].how,
                f"{mutant.module}:{mutant.line}: {mutant.before} -> {mutant.after}",
                flush=True,
            )
        if args.out:
            args.out.write_text(json.dumps(summary(outcomes), indent=1) + "\n")
    print(json.dumps(summary(outcomes)["modules"], indent=1))


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    modules: dict[str, dict[str, int]] = {}
    for mutant, how, _ in outcomes:
        counts = modules.setdefault(mutant.module, {"killed": 0, "timeout": 0, "survived": 0})
        counts[how] += 1
    return {
        "command": " ".join(sys.argv),
        "seconds": round(sum(outcome.seconds for outcome in outcomes)),
        "modules": modules,
        **{how: [one.mutant._asdict() for one in outcomes if one.how == how] for how in ("survived", "timeout")},
    }


if __name__ == "__main__":
    main()
