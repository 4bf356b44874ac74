"""Batches have every item once and in order, and are as large as allowed."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from dynlora_fn._core._batches import batches


@given(st.lists(st.integers(0, 9)), st.integers(0, 20))
def test_batches_join_items_up_to_a_limit(items, most):
    lists = list(batches(items, lambda item: item, most=most))
    assert [item for batch in lists for item in batch] == items
    assert all(batch and (sum(batch) <= most or len(batch) == 1) for batch in lists)
    assert all(sum(batch) + following[0] > most for batch, following in pairwise(lists))
