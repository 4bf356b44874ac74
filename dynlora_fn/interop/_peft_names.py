"""Take names of modules and parameters apart, as PEFT does to compare them."""

import re


def ends_of(path: str) -> list[str]:
    """Return a path and all of its ends that start after a dot.

    Example:
        >>> ends_of("layers.0.query")
        ['layers.0.query', '0.query', 'query']
    """
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def paths_above(name: str) -> list[str]:
    """Return the paths of the modules that contain a module or a tensor.

    The innermost is first, and the model itself is left out.

    Example:
        >>> paths_above("layers.0.query")
        ['layers.0', 'layers']
    """
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def plain_name(pattern: str) -> str | None:
    """Return the only name that a regular expression matches, or None.

    None means that the expression has operators.
    """
    name = re.sub(r"\\(\W)", r"\1", pattern)
    return name if re.escape(name) == pattern else None
