"""Products take the cheapest path."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynlora_fn.nn._contraction_paths import PRODUCTS, cheapest_path, flops

PATHS = ("factored", "merged", "dense")


def test_flops_are_those_of_the_table():
    d, r, n = 512, 128, 2048
    sizes = {"tokens": n, "out_features": d, "in_features": d, "rank": r}
    assert flops("full", **sizes) == 6 * n * d * d
    assert flops("factored", **sizes) == n * (4 * d * d + 12 * r * d)
    assert flops("merged", **sizes) == n * (4 * d * d + 8 * r * d) + 4 * r * d * d
    assert flops("dense", **sizes) == n * 6 * d * d + 8 * r * d * d
    assert set(PRODUCTS) == {"full", *PATHS}


@pytest.mark.parametrize(
    ("tokens", "rank", "path"),
    [(2048, 128, "merged"), (2048, 384, "dense"), (16, 128, "factored"), (2048, 8, "merged"), (0, 8, "factored")],
)
def test_the_cheapest_path_is_taken(tokens, rank, path):
    """High rank takes the dense gradient, few tokens take the factored form, and all others the merged weight."""
    assert cheapest_path(tokens=tokens, out_features=512, in_features=512, rank=rank) == path


def test_no_path_costs_much_more_than_full_rank_at_any_rank():
    for rank in range(1, 513):
        sizes = {"tokens": 4096, "out_features": 512, "in_features": 512, "rank": rank}
        assert flops(cheapest_path(**sizes), **sizes) <= flops("full", **sizes) * (1 + 4 * rank / (3 * 4096))


@given(st.tuples(*[st.integers(0, 40)] * 4), st.booleans())
def test_the_cheapest_path_has_the_fewest_flops_and_the_first_wins_a_tie(sizes, is_one_sided):
    named = dict(zip(("tokens", "out_features", "in_features", "rank"), sizes, strict=True))
    wanted = min(PATHS, key=lambda path: flops(path, **named, is_one_sided=is_one_sided))
    assert cheapest_path(**named, is_one_sided=is_one_sided) == wanted
