"""Which modules and parameters a configuration of PEFT selects.

Names are matched as in PEFT 0.21.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from dynlora_fn.interop._peft_names import ends_of, plain_name

Selects: TypeAlias = Callable[[str], object]  # takes the path of a module, or the name of a parameter


def adapted_modules(settings: Mapping[str, Any]) -> Selects:
    """Return whether a module is adapted by itself.

    `target_modules` selects it, and other settings limit it.
    """
    targets = settings.get("target_modules")
    is_target, is_excluded = _selection(targets), _selection(settings.get("exclude_modules"))
    in_layers = _in_layers(settings)
    exact = frozenset(targets) if isinstance(targets, list) else frozenset()
    saved = [re.compile(rf"(^|.*\.){name}($|\..*)") for name in settings.get("modules_to_save") or ()]

    def is_adapted(path: str) -> bool:
        if path == "" or not is_target(path) or is_excluded(path) or any(name.match(path) for name in saved):
            return False
        return isinstance(targets, str) or path in exact or in_layers(path)

    return is_adapted


def adapted_parameters(settings: Mapping[str, Any]) -> Selects:
    """Return whether a parameter is adapted by its name: by `target_parameters`."""
    return _ends_with(settings.get("target_parameters") or [])


def saved_modules(settings: Mapping[str, Any]) -> Selects:
    """Return whether a module is stored in full, by `modules_to_save`.

    PEFT compares it with the end of a path.
    """
    ends = tuple(settings.get("modules_to_save") or ())
    return lambda path: path.endswith(ends) if ends else False


def _selection(names: str | list[str] | None) -> Selects:
    """Return whether a path matches a regular expression or one of the names.

    A name matches the end of a path behind a dot.
    """
    if not isinstance(names, str):
        return _ends_with(names or [])
    plain = [plain_name(pattern) for pattern in names.split("|")]
    if None not in plain:  # a layer for each, as `save_adapter` writes them
        return frozenset(plain).__contains__
    return re.compile(names).fullmatch


def _ends_with(names: list[str]) -> Selects:
    known = frozenset(names)
    return lambda path: not known.isdisjoint(ends_of(path))


def _in_layers(settings: Mapping[str, Any]) -> Callable[[str], bool]:
    """Return whether the first number in a path is in `layers_to_transform`.

    It must be behind one of `layers_pattern`.
    """
    indices, lists = settings.get("layers_to_transform"), settings.get("layers_pattern")
    if indices is None or indices == []:
        return lambda path: True
    wanted = frozenset([indices] if isinstance(indices, int) else indices)
    lists = [lists] if isinstance(lists, str) and lists else lists
    expressions = [rf"(?:^|.*?\.){name}\.(?P<index>\d+)\." for name in lists or ()]
    matchers = [re.compile(expression) for expression in expressions or [r".*?\.[^.]*\.(?P<index>\d+)\."]]

    def in_layers(path: str) -> bool:
        found = next(filter(None, (matcher.match(path) for matcher in matchers)), None)
        return found is not None and int(found["index"]) in wanted

    return in_layers
