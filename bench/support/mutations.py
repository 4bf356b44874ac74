"""Change one expression of a library module at a time."""

import ast
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]


class Mutant(NamedTuple):
    """One change of one node in the syntax tree of a module."""

    module: str
    node: int  # index of the node
    way: int  # index of the change among all changes of the node
    line: int
    before: str
    after: str


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
    """Yield the replacements of a node."""
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
    """Return every mutant of a module."""
    tree = ast.parse(path_of(module).read_text())
    return [
        Mutant(module, index, way, node.lineno, ast.unparse(node).split("\n")[0], ast.unparse(new).split("\n")[0])
        for index, node in enumerate(_executable_nodes(tree))
        for way, new in enumerate(changes(node))
    ]


def _executable_nodes(tree: ast.AST) -> list[Any]:
    """Return the nodes that may be changed.

    Annotations, overloads, imports, assertions and errors are left out.
    """
    nodes: list[Any] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom | ast.Assert):
            return
        if isinstance(node, ast.FunctionDef) and any(
            "overload" in ast.unparse(decorator) for decorator in node.decorator_list
        ):
            return
        nodes.append(node)
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_ignores"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    visit(child)

    visit(tree)
    return nodes


def mutated(mutant: Mutant) -> str:
    """Return the source of the module with the change."""
    tree = ast.parse(path_of(mutant.module).read_text())
    target = _executable_nodes(tree)[mutant.node]
    new = list(changes(deepcopy(target)))[mutant.way]

    class Replace(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> Any:
            return new if node is target else self.generic_visit(node)

    return ast.unparse(ast.fix_missing_locations(Replace().visit(tree)))


def path_of(module: str) -> Path:
    """Return the file of a library module."""
    return (ROOT / "dynlora_fn" / module.replace(".", "/")).with_suffix(".py")
