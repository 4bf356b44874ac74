"""Find the modules and parameters that a configuration of PEFT selects.

Names are matched as in PEFT 0.21.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from dynlora_fn.interop._peft_names import ends_of, plain_name

Selects: TypeAlias = Callable[[str], object]  # takes the path of a module, or the name of a parameter


def adapted_modules(settings: Mapping[str, Any]) -> Selects:
    """Return a predicate of paths: whether PEFT adapts the module.

    `target_modules` selects modules, and other settings limit the selection.
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
    """Return a predicate of names: whether `target_parameters` selects the parameter."""
    return _ends_with(settings.get("target_parameters") or [])


def saved_modules(settings: Mapping[str, Any]) -> Selects:
    """Return a predicate of paths: whether the file stores the whole module.

    PEFT compares the entries of `modules_to_save` with the ends of paths.
    """
    ends = tuple(settings.get("modules_to_save") or ())
    return lambda path: path.endswith(ends) if ends else False


def _selection(names: str | list[str] | None) -> Selects:
    """Return a predicate of paths: whether a regular expression or a name matches.

    A regular expression matches the whole path. A name also matches the end of a path after a dot.
    """
    if not isinstance(names, str):
        return _ends_with(names or [])
    plain = [plain_name(pattern) for pattern in names.split("|")]
    if None not in plain:  # alternatives that are full names, as `save_adapter` writes them
        return frozenset(plain).__contains__
    return re.compile(names).fullmatch


def _ends_with(names: list[str]) -> Selects:
    known = frozenset(names)
    return lambda path: not known.isdisjoint(ends_of(path))


def _in_layers(settings: Mapping[str, Any]) -> Callable[[str], bool]:
    """Return a predicate of paths: whether `layers_to_transform` has the layer.

    The index is the number after a name of `layers_pattern`, or by default the first number after a name.
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
