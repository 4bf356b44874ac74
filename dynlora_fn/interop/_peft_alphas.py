"""The alpha of each layer in a configuration of PEFT."""

import math
import re
from collections.abc import Callable
from typing import Any


def alphas(config: dict[str, Any]) -> Callable[[str], float]:
    """Return a function that gives the alpha of a layer by its name.

    It is that of the first entry of `alpha_pattern` that matches the end of the name, behind a dot, or `lora_alpha`.
    Entries without operators of regular expressions, as `re.escape` writes names, are looked up without matching, so
    that a model with an entry for each layer does not match each name with each entry.
    """
    names: dict[str, tuple[int, float]] = {}
    expressions: list[tuple[int, re.Pattern[str], float]] = []
    for position, (pattern, alpha) in enumerate((config.get("alpha_pattern") or {}).items()):
        name = re.sub(r"\\(\W)", r"\1", pattern)
        if re.escape(name) == pattern:
            names.setdefault(name, (position, alpha))
        else:
            expressions.append((position, re.compile(rf"(.*\.)?({pattern})$"), alpha))
    default: float = config["lora_alpha"]

    def alpha_of(layer: str) -> float:
        parts = layer.split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts)))
        position, alpha = min((names[end] for end in ends if end in names), default=(math.inf, default))
        before = (entry for entry in expressions if entry[0] < position and entry[1].match(layer))
        return next((alpha for _, _, alpha in before), alpha)

    return alpha_of
