"""Let torch cache the graphs of steps, so that a second process compiles nothing.

AOTAutograd caches a graph by the code that Dynamo traced and by torch's settings. It refuses functions that it does not
know, such as the library's functions with `allow_in_graph`. Their results depend on their arguments and on the sources
of the library, which are a part of the key here.
"""

from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dynlora_fn._core._torch import are_transforms_active, get_hash_for_files, is_older_than

_LIBRARY = Path(__file__).parents[1]
# What functions of the library call while AOTAutograd traces them.
_DEPENDENCIES = ("torch", "torchao", "einops", "opt-einsum", "jaxtyping")
# Their results also depend on tables of the process.
_NEVER_CACHED = ("dynlora_fn.nn._remat._recompute",)
# torch 2.14 caches graphs with these itself: a graph has their arguments, and torch's key has the outer autocast.
_OF_TORCH = ("torch.amp.autocast_mode._enter_autocast", "torch.amp.autocast_mode._exit_autocast")


class _Cacheable(dict[str, str]):
    """The names of the library's functions and types, as a setting of Inductor."""

    def __contains__(self, name: object) -> bool:
        if name in _OF_TORCH:
            return True
        return str(name).startswith("dynlora_fn.") and name not in _NEVER_CACHED


def cache_options() -> dict[str, Any]:
    """Return the option of `torch.compile` with which such graphs are cached.

    Before torch 2.13 it is left out, because the key of a graph there lacks the dtype of autocast.
    """
    if is_older_than(2, 13):
        return {}
    return {"unsafe_marked_cacheable_functions": _Cacheable(dynlora_fn="keyed by the graph passes")}


def library_key() -> str | None:
    """Return a key of the library's graphs beside torch's own keys.

    Inside of a transform of `torch.func` this is None, so nothing is cached, because torch's keys lack the transforms.
    """
    if are_transforms_active():
        return None
    return f"{_key_of_code()}, {torch.get_default_dtype()}, {torch.get_default_device()}"


@cache
def _key_of_code() -> str:
    sources = tuple(sorted(map(str, _LIBRARY.rglob("*.py"))))
    versions = ", ".join(f"{name} {version(name)}" for name in _DEPENDENCIES)
    return f"{get_hash_for_files(sources).hex()}, {versions}"
