"""Changed arguments of every public function are refused by name, or mean what the valid ones mean.

``--fuzz 10000`` draws ten thousand of them.
"""

import re
import warnings
from collections import Counter
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import dynlora_fn as dl
from dynlora_fn._core._torch import tree_leaves
from tests.support import fuzz_packages, fuzz_table
from tests.support.fuzz_table import Entry
from tests.support.mutations import Mutation

REFUSALS = (TypeError, ValueError, NotImplementedError, KeyError, RuntimeError)  # the last from `functional_call`
NOT_DRAWN = {  # functions without arguments, and types
    "optim": {"register_state"},
    "parallel": {"register_gloo"},
    "schedules": {"never"},
}


@pytest.fixture(scope="module")
def entries() -> Iterator[dict[str, Entry]]:
    dist.init_process_group(dl.parallel.register_gloo(), store=dist.HashStore(), rank=0, world_size=1)
    yield {
        **fuzz_table.CORE,
        **fuzz_table.OPTIM,
        **fuzz_packages.SCHEDULES,
        **fuzz_packages.BASES,
        **fuzz_packages.parallel(dist.group.WORLD),
        **fuzz_packages.INTEROP,
        **fuzz_packages.SWITCHING,
    }
    dist.destroy_process_group()


def outcome(entry: Entry, argument: str, mutation: Mutation, expected: Any) -> str:
    """Return "refused by name", "the same", or what went wrong."""
    arguments = {name: valid for name, (valid, _) in entry.arguments.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = entry.call(**{**arguments, argument: mutation.value})
    except Exception as error:
        return _of_error(error, argument, mutation)
    if mutation.is_wrong:
        return "passes silently"
    return "the same" if is_close(result, expected) else "another result"


def _of_error(error: Exception, argument: str, mutation: Mutation) -> str:
    if not mutation.is_wrong:
        return f"a valid value is refused: {type(error).__name__} {error}"
    names = "|".join([rf"`{argument}\b", rf"\b{argument}`", f"'{argument}'", *map(re.escape, mutation.names)])
    if isinstance(error, REFUSALS) and re.search(names, str(error)):
        return "refused by name"
    return f"an error that names nothing: {type(error).__name__} {str(error)[:200]}"


def is_close(result: Any, expected: Any) -> bool:
    """Return whether two trees have equal structures, and equal numbers except for rounding."""
    leaves, others = tree_leaves(result), tree_leaves(expected)
    return len(leaves) == len(others) and all(map(_is_close, leaves, others))


def _is_close(leaf: Any, other: Any) -> bool:
    if isinstance(leaf, Tensor) and isinstance(other, Tensor):
        same_shape = leaf.shape == other.shape and leaf.dtype == other.dtype
        return same_shape and torch.allclose(leaf.double(), other.double(), rtol=1e-5, atol=1e-6, equal_nan=True)
    return type(leaf) is type(other) and (leaf == other or not isinstance(leaf, int | float | str))


def test_changed_arguments_are_refused_by_name_or_mean_the_same(
    entries: dict[str, Entry], request: pytest.FixtureRequest
):
    expected: dict[str, Any] = {}
    counts: Counter[str] = Counter()
    problems: dict[str, str] = {}
    for seed in range(request.config.getoption("--fuzz") or 2000):
        random = Random(seed)
        name = random.choice(list(entries))
        entry = entries[name]
        argument = random.choice(list(entry.arguments))
        valid, kind = entry.arguments[argument]
        if name not in expected:
            expected[name] = entry.call(**{key: value for key, (value, _) in entry.arguments.items()})
        mutation = kind(random, valid)
        result = outcome(entry, argument, mutation, expected[name])
        counts[result.partition(":")[0]] += 1
        if result not in ("refused by name", "the same"):
            problems.setdefault(f"{name}({argument}={mutation.story})", f"seed {seed}: {result}")
    print(*counts.items(), sep="\n")
    listed = "\n".join(f"{call}: {problem}" for call, problem in sorted(problems.items()))
    assert not problems, f"{dict(counts)}\n{listed}"


def test_every_public_function_is_drawn(entries: dict[str, Entry]):
    drawn = {re.split(r"[ ,]", name)[0] for name in entries}
    spaces = {"": dl, **{name: getattr(dl, name) for name in ("optim", "schedules", "bases", "parallel", "interop")}}
    spaces["switching"] = dl.switching
    for name, space in spaces.items():
        functions = {key for key, value in vars(space).items() if _is_function(value) and key[0] != "_"}
        assert functions - drawn - NOT_DRAWN.get(name, set()) == set(), name


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, type) and getattr(value, "__module__", "").startswith("dynlora_fn")
