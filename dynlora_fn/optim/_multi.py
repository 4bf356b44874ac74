"""`multi_transform`: use several optimizers, each for some of the parameters."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dynlora_fn._core._check import check_by_name, check_callable, described
from dynlora_fn._core._check_trees import check_trainable
from dynlora_fn._core._types import AnyFactors, Trainable
from dynlora_fn.optim._transform import Rate, Transform, Tree, Updates, check_transform, check_update, check_updates


def multi_transform(
    transforms: Mapping[str, Transform], choose: Callable[[str, AnyFactors | Tensor], str]
) -> Transform:
    """Create an optimizer that applies a chosen transform to each parameter.

    Each transform updates the parameters that `choose` assigns to it, as if there were no others. The interface is like
    `multi_transform` of optax.

    Args:
        transforms: The optimizers by key.
        choose: A function that returns a key of `transforms` for the name and leaf of a parameter.

    Returns:
        The optimizer. Its state is a dict of the states of the transforms by key.

    Raises:
        TypeError: If one of `transforms` is not a `Transform`, or `choose` is not a function.
        ValueError: If `transforms` is not a dict. In `init` and `update`, if `choose` returns a key that `transforms`
            does not have. In `update`, if `grads` does not have the names and shapes of `trainable`, or `opt_state`
            does not have the keys of `transforms`.

    Example: Muon for the factors, AdamW for all other parameters.
        >>> import torch
        >>> from torch import Tensor
        >>> from dynlora_fn import Factors
        >>> from dynlora_fn.optim import adamw, muon
        >>> optimizer = multi_transform(
        ...     {"muon": muon(), "adamw": adamw()},
        ...     lambda name, leaf: "adamw" if isinstance(leaf, Tensor) else "muon",
        ... )
        >>> state = optimizer.init({"w": Factors(b=torch.ones(3, 1), a=torch.ones(1, 2)), "bias": torch.ones(3)})
        >>> [list(each.inner.mu) for each in state.values()]
        [['w'], ['bias']]
    """

    check_by_name("transforms", transforms, of="optimizers by key")
    for key, transform in transforms.items():
        check_transform(f"transforms[{key!r}]", transform)
    check_callable("choose", choose)

    def split(trainable: Trainable) -> dict[str, dict[str, AnyFactors | Tensor]]:
        groups: dict[str, dict[str, AnyFactors | Tensor]] = {key: {} for key in transforms}
        for name, leaf in trainable.items():
            key = choose(name, leaf)
            if not isinstance(key, str) or key not in groups:
                raise ValueError(f"`choose` returned {key!r} for {name!r}; return one of {', '.join(transforms)}")
            groups[key][name] = leaf
        return groups

    def init(trainable: Trainable) -> dict[str, Any]:
        check_trainable("trainable", trainable)
        return {key: transforms[key].init(group) for key, group in split(trainable).items()}

    def update(
        grads: Trainable, opt_state: Mapping[str, Any], trainable: Trainable, *, lr: Rate | Mapping[str, Rate]
    ) -> Updates:
        check_update(grads, trainable, lr)
        _check_groups(opt_state, transforms)
        updates: Tree = {}
        new: dict[str, Any] = {}
        for key, group in split(trainable).items():
            group_grads = {name: grads[name] for name in group}
            group_lr = {name: lr[name] for name in group} if isinstance(lr, Mapping) else lr
            group_updates, new[key] = transforms[key].update(group_grads, opt_state[key], group, lr=group_lr)
            check_updates(f"transforms[{key!r}].update", group_updates, group)
            updates |= group_updates
        return Updates({name: updates[name] for name in trainable}, new)

    return Transform(init, update)


def _check_groups(opt_state: Any, transforms: Mapping[str, Transform]) -> None:
    if not isinstance(opt_state, Mapping) or set(opt_state) != set(transforms):
        raise ValueError(
            f"`opt_state` is {described(opt_state)}, but must have the keys {list(transforms)} of `transforms`; "
            "pass the state that `init` returned"
        )
