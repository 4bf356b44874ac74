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


def for_factors(transform: Transform) -> Transform:
    """Return an optimizer that needs matrices, with SGD for all other tensors."""
    return multi_transform(
        {"muon": transform, "sgd": sgd()}, lambda name, leaf: "sgd" if isinstance(leaf, Tensor) else "muon"
    )


OPTIMIZERS = {
    "adamw": Entry(adamw()),
    "sgd": Entry(sgd()),
    "lion": Entry(lion()),
    "muon": Entry(for_factors(muon())),
    "muon, coupled": Entry(for_factors(muon(coefficients="polar_express_5", coupled=2))),
}
