"""The lint of docstrings, comments, errors and Markdown finds what it is for."""

import importlib.util
from pathlib import Path

import pytest

from tests.support.paths import ROOT

SPEC = importlib.util.spec_from_file_location("lint_text", ROOT / ".ci" / "lint_text.py")
lint_text = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(lint_text)

PATH = Path("module.py")
WORD = next(iter(lint_text.UNCLEAR))
PYTHON = {
    "summary of 82": f'"""{"a" * 81}."""',
    "without a period": '"""Types of weights"""',
    "without an empty line": '"""Types of weights.\nThey are tuples."""',
    "does not open with a verb": 'def f():\n    """The weight."""',
    "without a message": "raise ValueError",
    "not one literal": "raise ValueError('rank ' + name)",
    f"unclear {WORD!r}": f"x = 1  # all {WORD} one",
    f"unclear {WORD.upper()!r}": f"print('all {WORD.upper()} one')",
}


@pytest.mark.parametrize("problem", PYTHON)
def test_each_rule_of_python_finds_its_example(problem: str):
    (finding,) = lint_text.python_findings(PATH, PYTHON[problem])
    assert problem in finding.problem


def test_right_python_has_no_finding():
    source = '''
"""Types of weights."""


def f(error: Exception, *, name: str):
    """Raise an error.

    It names the weight.
    """
    if name:
        raise ValueError(f"{name!r} is no weight; pass `holds`")
    raise error
'''
    assert not list(lint_text.python_findings(PATH, source))


def test_the_docstring_of_a_test_may_be_any_sentence():
    source = f'"""Tests."""\ndef test_f():\n    """{"a" * 90}"""'
    assert not list(lint_text.python_findings(Path("test_f.py"), source))


def test_long_lines_and_sentences_of_markdown_are_found():
    long = "- a list item\n\n" + "a " * 25 + "word\n" + "a " * 4 + "word."
    (finding,) = lint_text.markdown_findings(PATH, long)
    assert finding.line == 3
    assert "31 words" in finding.problem
    (finding,) = lint_text.markdown_findings(PATH, "a" * 121)
    assert "121 characters" in finding.problem


def test_tables_and_code_of_markdown_may_be_long():
    code = "x " * 100
    assert not list(
        lint_text.markdown_findings(PATH, f"| {code} |\n\n```sh\n{code}\n```\n\n    {code}\n\nSee `{code[:100]}`.")
    )
