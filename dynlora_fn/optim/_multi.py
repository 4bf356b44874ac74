"""Several optimizers at once."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dynlora_fn._core._types import Factors, Trainable
from dynlora_fn.optim._transform import Rate, Transform, Tree, Updates


def multi_transform(transforms: Mapping[str, Transform], choose: Callable[[str, Factors | Tensor], str]) -> Transform:
    """Several optimizers, each of its own parameters, as optax has it: every parameter moves as it would with its
    transform alone.

    Args:
        transforms: by what they are called.
        choose: of a parameter's name and leaf, which of them.

    Raises:
        ValueError: in `init` and `update`, if `choose` names none of `transforms`.

    Example: Muon for the factors, AdamW for all else.
        >>> import torch
        >>> from dynlora_fn.optim import adamw, muon
        >>> optimizer = multi_transform(
        ...     {"muon": muon(), "adamw": adamw()},
        ...     lambda name, leaf: "muon" if isinstance(leaf, Factors) else "adamw",
        ... )
        >>> state = optimizer.init({"w": Factors(b=torch.ones(3, 1), a=torch.ones(1, 2)), "bias": torch.ones(3)})
        >>> [list(own.mu) for own in state.values()]
        [['w'], ['bias']]
    """

    def parts(trainable: Trainable) -> dict[str, dict[str, Factors | Tensor]]:
        own: dict[str, dict[str, Factors | Tensor]] = {key: {} for key in transforms}
        for name, leaf in trainable.items():
            key = choose(name, leaf)
            if key not in own:
                raise ValueError(f"`choose` must name one of {', '.join(transforms)} for {name!r}, got {key!r}")
            own[key][name] = leaf
        return own

    def init(trainable: Trainable) -> dict[str, Any]:
        return {key: transforms[key].init(own) for key, own in parts(trainable).items()}

    def update(
        grads: Trainable, opt_state: Mapping[str, Any], trainable: Trainable, *, lr: Rate | Mapping[str, Rate]
    ) -> Updates:
        updates: Tree = {}
        new: dict[str, Any] = {}
        for key, own in parts(trainable).items():
            own_grads = {name: grads[name] for name in own}
            own_updates, new[key] = transforms[key].update(own_grads, opt_state[key], own, lr=lr)
            updates |= own_updates
        return Updates({name: updates[name] for name in trainable}, new)

    return Transform(init, update)
