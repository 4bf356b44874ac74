"""Settings of the whole suite."""

import os
import sys

# Some virtual machines report AMX and forbid it: oneDNN's bfloat16 products then end in an illegal instruction.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # busy neighbors slow a spinning OpenMP down tenfold
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may need a network

import pytest
import torch
from hypothesis import settings

# A first example may compile or import, so a deadline says nothing. In CI, where nobody shrinks by hand, every
# run draws the same examples. `--hypothesis-profile thorough` draws many, before a release, and
# `sequences` is for `tests/testing/test_machine.py`.
settings.register_profile("dynlora", deadline=None, max_examples=25, derandomize=bool(os.environ.get("CI")))
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.register_profile("sequences", deadline=None, max_examples=2000, stateful_step_count=30)
settings.load_profile("dynlora")

pytest.register_assert_rewrite("tests.support")  # helpers that assert say what differed

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores: more threads than cores wait for each other


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--damaged", type=int, default=40, help="inputs of each kind in tests/system/test_damage.py")
    parser.addoption("--compositions", action="store_true", help="also run tests of all compositions of transforms")
    parser.addoption("--fuzz", type=int, help="changed arguments and files in tests/system/test_fuzz*.py")
    parser.addoption("--shapes", action="store_true", help="enforce the shapes in the annotations of dynlora_fn")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--shapes"):
        from tests.support import shapes  # noqa: PLC0415, for this option only

        shapes.install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests that take hours together, unless the command asks for them."""
    if not config.getoption("--compositions"):
        items[:] = [item for item in items if "compositions" not in item.keywords]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """Reset Dynamo. It caches by code object, so one test's graphs would count as another's recompiles."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
