"""The page of what works together says what happens."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from dynlora_fn.parallel import register_gloo
from tests.support.feature_matrix import FEATURES, PAGE, page, rows

LINES = PAGE.read_text().split("\n")


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    """Run each test in a group of one process."""
    dist.init_process_group(register_gloo(), store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_page_has_a_row_for_each_feature():
    assert [line.split(" | ")[0].removeprefix("| ") for line in LINES if line.startswith("| ")][1:] == list(FEATURES)


@pytest.mark.parametrize("feature", ["`merge`", "`switching.init_pool`"])
def test_a_row_says_what_happens(feature: str):
    notes = [line.split(". ", 1)[1] for line in LINES if line[:1].isdigit()]
    assert rows([feature], notes)[0] in LINES


@pytest.mark.slow
def test_the_page_says_what_happens():
    assert page(list(FEATURES)).split("\n") == LINES
