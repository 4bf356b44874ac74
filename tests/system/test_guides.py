"""The guides run, and what they claim is what happens."""

import runpy
from collections.abc import Iterator

import pytest

from dynlora_fn.nn._register import REGISTERED
from tests.support.paths import ROOT

GUIDES = sorted(path.stem for path in (ROOT / "models" / "guides").glob("*.py") if path.stem != "__init__")
NEEDED = {"finetune": ["transformers"], "from_peft": ["peft", "transformers"]}
ELSEWHERE = {"several_processes", "testing_a_transform"}  # the tests of the README run these, and read their output


@pytest.fixture(autouse=True)
def _no_rule_stays() -> Iterator[None]:
    """Remove the rules that a guide registers."""
    before = dict(REGISTERED)
    yield
    REGISTERED.clear()
    REGISTERED.update(before)


@pytest.mark.parametrize("name", [name for name in GUIDES if name not in ELSEWHERE])
def test_a_guide_runs(name: str):
    for package in NEEDED.get(name, []):
        pytest.importorskip(package)
    runpy.run_module(f"models.guides.{name}", run_name="__main__")


@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_is_short(name: str):
    lines = (ROOT / "models" / "guides" / f"{name}.py").read_text().count("\n")
    assert lines <= (180 if name == "gotchas" else 80)


def test_the_table_of_guides_lists_all():
    page = (ROOT / "models" / "guides" / "README.md").read_text()
    assert sorted(line.split("`")[1] for line in page.splitlines() if line.startswith("| `")) == GUIDES
