"""Check the English of docstrings, comments, errors and Markdown.

Each finding is printed with its place. Run ``python .ci/lint_text.py`` in the root of the repository. The exit code is
1 if there is a finding.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SUMMARY, COLUMNS, WORDS = 80, 120, 30  # characters of a summary, columns of Markdown, words of a sentence in Markdown
# Words that make a text hard to read, each with what to write instead.
UNCLEAR = {
    "but for": "except",
    "alone": "only",
    "anew": "again",
    "likewise": "say what",
    "of which": "two sentences",
    "of whose": "two sentences",
    "its own": "drop it",
    "told": "passed",
    "asked": "called",
    "holds": "contains, or stores",
    "each of which": "two sentences",
    "the rest": "name it",
    "no more than": "at most",
    "no other": "name it",
    "as it is": "unchanged",
    "that of": "repeat the noun",
    "stands for": "means",
}
UNCLEAR_PATTERN = re.compile(rf"\b({'|'.join(sorted(UNCLEAR, key=len, reverse=True))})\b", re.IGNORECASE)
# The verbs that open the docstrings of functions. Add one that is missing.
VERBS = frozenset((Path(__file__).parent / "verbs.txt").read_text().split())


class Finding(NamedTuple):
    """One place that breaks a rule."""

    path: Path
    line: int
    problem: str


def python_findings(path: Path, source: str) -> Iterator[Finding]:
    """Yield the findings in docstrings, comments and errors of a Python file."""
    tree, is_test = ast.parse(source), path.name.startswith(("test_", "conftest"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            for problem in docstring_problems(node, is_test=is_test):
                yield Finding(path, node.body[0].lineno, problem)
        elif isinstance(node, ast.Raise) and not is_test and (problem := problem_of_error(node)):
            yield Finding(path, node.lineno, problem)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in UNCLEAR:
            yield from (Finding(path, node.lineno, problem) for problem in unclear_words(node.value))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield from (Finding(path, token.start[0], problem) for problem in unclear_words(token.string))


def docstring_problems(node: ast.AST, *, is_test: bool) -> Iterator[str]:
    """Yield what is wrong with the summary of a docstring.

    The docstrings in a file of tests may be any sentences.
    """
    docstring = ast.get_docstring(node)  # type: ignore[arg-type]
    if docstring is None or is_test:
        return
    summary, *rest = docstring.split("\n")
    if len(summary) > SUMMARY:
        yield f"summary of {len(summary)} characters: {summary}"
    if not summary.endswith((".", "?")):  # a benchmark asks a question
        yield f"summary without a period: {summary}"
    if rest and rest[0]:
        yield f"summary without an empty line after it: {summary}"
    if isinstance(node, ast.FunctionDef) and not is_property(node):
        verb = re.split(r"[\s,]", summary, maxsplit=1)[0]
        if verb not in VERBS:
            yield f"summary that does not open with a verb of the list: {summary}"


def is_property(node: ast.FunctionDef) -> bool:
    """Return whether a function is a property, whose docstring says what the value is."""
    return any("property" in ast.unparse(decorator) for decorator in node.decorator_list)


def problem_of_error(node: ast.Raise) -> str | None:
    """Return what is wrong with an error.

    It must have one literal or f-string as its message.
    """
    error = node.exc
    if error is None or not is_exception(error.func if isinstance(error, ast.Call) else error):
        return None  # `raise`, or an error that was created elsewhere
    if not isinstance(error, ast.Call) or not error.args:
        return f"error without a message: {ast.unparse(node)[:60]}"
    if isinstance(error.args[0], ast.BinOp):
        return f"error whose message is not one literal: {ast.unparse(node)[:60]}"
    return None


def is_exception(node: ast.expr) -> bool:
    """Return whether an expression is the name of a class of errors."""
    return isinstance(node, ast.Name) and node.id.endswith(("Error", "Exception", "Exit"))


def unclear_words(text: str) -> Iterator[str]:
    """Yield the words of a text that are hard to read, without quoted code."""
    for match in UNCLEAR_PATTERN.finditer(re.sub(r"`[^`]*`", "", " ".join(text.split()))):
        yield f"unclear {match[0]!r} ({UNCLEAR[match[0].lower()]})"


def markdown_findings(path: Path, source: str) -> Iterator[Finding]:
    """Yield long lines, long sentences, and words that are hard to read."""
    for line, text in prose_lines(source):
        if len(text) > COLUMNS:
            yield Finding(path, line, f"line of {len(text)} characters")
    for line, text in enumerate(source.split("\n"), 1):
        if text.lstrip().startswith("|"):
            yield from (Finding(path, line, problem) for problem in unclear_words(text))
    for line, text in paragraphs(source):
        yield from (Finding(path, line, problem) for problem in unclear_words(text))
        for sentence in sentences(text):
            if (words := len(sentence.split())) > WORDS:
                yield Finding(path, line, f"sentence of {words} words: {sentence[:60]}")


def prose_lines(source: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of Markdown with their numbers, without code and tables."""
    is_code = False
    for line, text in enumerate(source.split("\n"), 1):
        if text.lstrip().startswith("```"):
            is_code = not is_code
            yield line, ""
        elif is_code or text.lstrip().startswith("|") or text.startswith("    "):
            yield line, ""
        else:
            yield line, text


def paragraphs(source: str) -> Iterator[tuple[int, str]]:
    """Yield the paragraphs, headings and list items of Markdown.

    Each has the number of its first line.
    """
    first, lines = 0, []
    for line, text in [*prose_lines(source), (0, "")]:
        if lines and (not text.strip() or re.match(r"\s*([-*]|\d+\.|#+) ", text)):
            yield first, " ".join(lines)
            lines = []
        if text.strip():
            first = first if lines else line
            lines.append(re.sub(r"^\s*([-*]|\d+\.|#+) ", "", text).strip())


def sentences(text: str) -> list[str]:
    """Return the sentences of a paragraph.

    Code counts as one word, and a link as its text.
    """
    text = re.sub(r"`[^`]*`", "code", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text))
    return [sentence for sentence in re.split(r"(?<=[.!?])\s+", text) if sentence]


def findings(root: Path) -> list[Finding]:
    """Return the findings in all files of the repository that git tracks or would add."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py", "*.md"]
    names = subprocess.run(listing, cwd=root, check=True, capture_output=True, text=True).stdout.split("\n")
    paths = sorted({root / name for name in names if name and (root / name).is_file()})
    check = {".py": python_findings, ".md": markdown_findings}
    return [finding for path in paths for finding in check[path.suffix](path, path.read_text())]


def main() -> None:
    """Print all findings, and exit with code 1 if there is one."""
    root = Path(__file__).parent.parent
    found = findings(root)
    for path, line, problem in found:
        print(f"{path.relative_to(root)}:{line}: {problem}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
