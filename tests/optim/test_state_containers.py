"""Projecting an optimizer's state keeps the types and the other contents of its containers."""

from collections import OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass

from dynlora_fn import project_optimizer_state
from dynlora_fn.optim import register_state
from dynlora_fn.testing import Shape, assert_same, low_rank, normal
from tests.support.optimizer_states import SWITCH, Record, filled
from tests.support.optimizers import one_switch

PARAM = low_rank(Shape(5, 6, 4))
TRAINABLE = {"w": PARAM.factors, "bias": normal(1, 5)}
PLAN = one_switch(**SWITCH)
ROLES = {"mean": "first_moment", "square": "second_moment", "seen": "count", "shared": "unchanged"}


@dataclass
class Plain:
    velocity: Any
    note: str = "free"
    roles = {"velocity": "first_moment"}  # noqa: RUF012, an annotation would make it a field


@dataclass(frozen=True)
class Frozen:
    velocity: Any
    steps: int = field(default=3, init=False)
    roles = {"velocity": "first_moment"}  # noqa: RUF012


@dataclass(slots=True)
class Slots:
    velocity: Any


@dataclass
class Registered:
    velocity: Any


class Subclassed(dict):
    """A dict with an attribute."""

    label = "none"


class ByAttribute(dict):
    """A dict whose keys are attributes, and whose missing attributes raise KeyError."""

    __getattr__ = dict.__getitem__


class Mapped(MutableMapping[str, Any]):
    """A mapping that is no dict. Its shallow copy shares the dict in which it stores its entries."""

    def __init__(self, entries: Any) -> None:
        self.entries = dict(entries)

    def __getitem__(self, key: str) -> Any:
        return self.entries[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.entries[key] = value

    def __delitem__(self, key: str) -> None:
        del self.entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


register_dataclass(Registered)
for kind in (Slots, Registered):
    register_state(kind, {"velocity": "first_moment"})


def dict_of(kind: Callable[[Any], Any]) -> Any:
    return lambda tree: {"mean": kind(tree)}


CONTAINERS = {
    "dataclass": Plain,
    "frozen dataclass": Frozen,
    "dataclass with slots": Slots,
    "registered dataclass": Registered,
    "NamedTuple": Record,
    "OrderedDict": dict_of(OrderedDict),
    "defaultdict": dict_of(partial(defaultdict, list)),
    "subclass of dict": dict_of(Subclassed),
    "dict of dicts": lambda tree: {"deep": {"deeper": {"mean": tree}}},
    "list": lambda tree: [Plain(tree), None, 2],
    "tuple": lambda tree: (Record(tree), "text", torch.tensor(1.0)),
    "deque": lambda tree: deque([Record(tree), torch.ones(3)], maxlen=2),
    "history in a declared field": lambda tree: Record((tree, [tree])),
    "shape": lambda tree: (Record(tree), torch.Size([2, 3]), torch.float32, torch.device("cpu"), sum),
}


def velocities(node: Any) -> list[Any]:
    """Return the dicts by parameter name, wherever they are."""
    if isinstance(node, dict) and "w" in node:
        return [node]
    inside = node.values() if isinstance(node, dict) else node if isinstance(node, tuple | list | deque) else []
    attributes = [node.velocity] if hasattr(node, "velocity") else []
    return [found for child in (attributes or inside) for found in velocities(child)]


def kinds(node: Any) -> Any:
    """Return the types of all nodes."""
    children = node.values() if isinstance(node, dict) else node if isinstance(node, tuple | list | deque) else []
    attributes = [node.velocity] if hasattr(node, "velocity") else []
    return type(node), [kinds(child) for child in (*children, *attributes) if not isinstance(child, Tensor)]


@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS)
def test_containers_keep_their_types_and_other_contents(make: Any):
    state = make(filled(TRAINABLE))
    new = project_optimizer_state(state, PLAN, roles=ROLES)
    assert kinds(new) == kinds(state)
    wanted = project_optimizer_state({"mean": filled(TRAINABLE)}, PLAN, roles=ROLES)["mean"]
    assert len(velocities(new)) == len(velocities(state)) > 0
    for got, old in zip(velocities(new), velocities(state), strict=True):
        assert_same(dict(got), wanted)
        assert_same(dict(old), filled(TRAINABLE))


def test_what_else_a_container_has_is_kept():
    tree = filled(TRAINABLE)
    note = project_optimizer_state(Plain(tree, "mine"), PLAN).note
    steps = project_optimizer_state(Frozen(tree), PLAN).steps
    history = project_optimizer_state(deque([Record(tree)], maxlen=3), PLAN)
    groups = project_optimizer_state({"mean": defaultdict(list, tree)}, PLAN, roles=ROLES)["mean"]
    assert (note, steps, history.maxlen, groups.default_factory) == ("mine", 3, 3, list)
    named = Subclassed(tree)
    named.label = "mine"
    assert project_optimizer_state({"mean": named}, PLAN, roles=ROLES)["mean"].label == "mine"


@pytest.mark.parametrize("kind", [Mapped, UserDict, ByAttribute])
def test_mappings_of_other_types_are_not_changed(kind: Any):
    tree = filled(TRAINABLE)
    state = kind({"mean": kind(tree), "note": "mine"})
    new = project_optimizer_state(state, PLAN, roles=ROLES)
    assert (type(new), type(new["mean"]), list(new), new["note"]) == (kind, kind, ["mean", "note"], "mine")
    assert all(state["mean"][name] is leaf for name, leaf in tree.items())
    assert new["mean"]["bias"] is tree["bias"]  # no tensor is copied
    wanted = project_optimizer_state({"mean": tree}, PLAN, roles=ROLES)["mean"]
    assert_same(dict(new["mean"]), wanted)
