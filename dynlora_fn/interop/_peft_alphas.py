"""Find the alpha and the rank of each layer in a configuration of PEFT."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from dynlora_fn.interop._peft_names import ends_of, plain_name


def alphas(config: Mapping[str, Any]) -> Callable[[str], float]:
    """Return a function from the name of a layer to its alpha.

    The alpha comes from `alpha_pattern` where a pattern matches, and else from `lora_alpha`.
    """
    return by_pattern(config.get("alpha_pattern") or {}, config["lora_alpha"])


def ranks(config: Mapping[str, Any]) -> Callable[[str], int]:
    """Return a function from the name of a layer to its rank.

    The rank comes from `rank_pattern` where a pattern matches, and else from `r`.
    """
    rank_of = by_pattern(config.get("rank_pattern") or {}, config["r"])
    return lambda layer: int(rank_of(layer))


def by_pattern(patterns: Mapping[str, float], default: float) -> Callable[[str], float]:
    """Return a function from a name to the value of the first pattern that matches it.

    A pattern matches a whole name, or the end of a name after a dot. A pattern without operators of regular
    expressions, as `re.escape` writes names, is looked up in a dict. So the time for a model with an entry for each
    layer does not grow as the square of the number of layers.
    """
    names: dict[str, tuple[int, float]] = {}
    expressions: list[tuple[int, re.Pattern[str], float]] = []
    for position, (pattern, value) in enumerate(patterns.items()):
        name = plain_name(pattern)
        if name is not None:
            names.setdefault(name, (position, value))
        else:
            expressions.append((position, re.compile(rf"(.*\.)?({pattern})$"), value))

    def value_of(layer: str) -> float:
        ends = (end for end in ends_of(layer) if end in names)
        position, value = min((names[end] for end in ends), default=(math.inf, patterns.get(layer, default)))
        before = (entry for entry in expressions if entry[0] < position and entry[1].match(layer))
        return next((value for _, _, value in before), value)

    return value_of
