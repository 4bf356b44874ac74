"""`Visitor`: what a search of an optimizer state does with factors that it finds."""

from collections.abc import Mapping
from typing import Any, Protocol

from dynlora_fn._core._types import AnyFactors, Trainable
from dynlora_fn.optim._containers import Path
from dynlora_fn.optim._roles import Roles


class Visitor(Protocol):
    """A change of the factors in an optimizer state."""

    @property
    def plan(self) -> Mapping[str, Any]:
        """The parameters whose state changes, by name."""

    @property
    def trainable(self) -> Trainable | None:
        """The trainable parameters, for states that number their tensors."""

    @property
    def roles(self) -> Roles:
        """The roles of fields whose types do not declare roles."""

    def visit(self, leaf: AnyFactors, role: Any, name: str, path: Path) -> AnyFactors:
        """Return the new state of a parameter in a field with a role."""

    def keep(self, node: Any, path: Path) -> Any:
        """Return the content of a field with the role "unchanged", or raise an error."""

    def check_foreign(self, library: str, path: Path) -> None:
        """Raise if states of another library are not supported."""
