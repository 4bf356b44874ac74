"""The table of optimizers.

An entry gives an optimizer every test that is parametrized over the table.
"""

from typing import NamedTuple

from torch import Tensor

from dynlora_fn.optim import Transform, adamw, lion, multi_transform, muon, sgd


class Entry(NamedTuple):
    """An optimizer that can train factors and tensors of any shape."""

    transform: Transform
    has_first_moment: bool = True  # which "transport" needs


OPTIMIZERS = {
    "adamw": Entry(adamw()),
    "sgd": Entry(sgd()),
    "lion": Entry(lion()),
    "muon": Entry(
        multi_transform(
            {"muon": muon(), "sgd": sgd()}, lambda name, leaf: "sgd" if isinstance(leaf, Tensor) else "muon"
        )
    ),
}
