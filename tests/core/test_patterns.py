"""Names and globs select what comparing each name with each pattern selects."""

from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynlora_fn._core._patterns import Patterns, match

texts = st.text("ab.*?[]!0", max_size=6)


@given(st.lists(texts, max_size=4), st.lists(texts, max_size=5))
def test_patterns_match_names_and_globs_in_their_order(names, patterns):
    wanted = [
        pattern
        for pattern in dict.fromkeys(patterns)
        if any(name == pattern or fnmatchcase(name, pattern) for name in names)
    ]
    assert Patterns(patterns).matching(names) == wanted


@given(st.lists(texts, max_size=4, unique=True), st.lists(texts, max_size=3))
def test_match_selects_names_in_their_order(names, patterns):
    matching = [name for name in names if Patterns(patterns).matching([name])]
    if all(Patterns([pattern]).matching(names) for pattern in patterns):
        assert match(names, patterns, "targets") == matching
    else:
        with pytest.raises(ValueError, match=r"`targets` contains .*, which matches no name; use names or globs of"):
            match(names, patterns, "targets")
