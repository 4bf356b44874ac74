"""Checkers of transforms of a weight, one call with the same arguments each.

A transform takes a weight, or a weight and a plan for it, and returns the new weight, alone or first of several: as
`merge` and `switch` do. Transforms of parameters by name are checked with ``arguments=trees()``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dynlora_fn._core._torch import tree_map
from dynlora_fn.testing._compare import assert_same, assert_within, kind, pairs, untouched
from dynlora_fn.testing._promises import Arguments, arguments_of, hold, new_params, weights_of
from dynlora_fn.testing._shadow import exact_weight, rounding

Transform = Callable[..., Any]


def check_preserves_weight(
    transform: Transform, *, folds: int = 1, arguments: Arguments = None, examples: int | None = None
) -> None:
    """The weight is the same, in float64 and from the definition, but for the roundings of its folds.

    What is compared is ``base + b @ a / rank`` with the residual of a base in codes and with what waits of a deferred
    one.

    Args:
        transform: of a weight, or of a weight and a plan.
        folds: how often it folds into a base, each of which rounds once.
        arguments: a strategy for its arguments or a tuple of them; drawn of all kinds unless given.
        examples: how many to draw; the hypothesis profile's number unless given.

    Raises:
        BrokenPromiseError: if it does not; with the smallest example.

    Example:
        >>> import dynlora_fn as dl
        >>> check_preserves_weight(dl.switch)
    """

    def check(params: Any, *rest: Any) -> None:
        after = weights_of(new_params(transform(params, *rest)))
        for name, before in weights_of(params).items():
            assert name in after, f"there is no low-rank weight {name!r} any more"
            bound = rounding(before, after[name], folds=folds)
            assert_within(exact_weight(after[name]), exact_weight(before), bound)

    hold("the weight is kept", check, arguments_of(transform, arguments), examples)


def check_pure(transform: Transform, *, arguments: Arguments = None, examples: int | None = None) -> None:
    """The arguments hold the same values afterwards, nobody has written into them, and no global random number was
    drawn. Arguments and exceptions as `check_preserves_weight`.

    Example:
        >>> import dynlora_fn as dl
        >>> check_pure(dl.switch)
    """

    def check(*given: Any) -> None:
        state = torch.get_rng_state()
        with untouched(*given):
            transform(*given)
        assert torch.equal(state, torch.get_rng_state()), "a random number was drawn from torch's global generator"

    hold("arguments and global state are left alone", check, arguments_of(transform, arguments), examples)


def check_keeps_structure(transform: Transform, *, arguments: Arguments = None, examples: int | None = None) -> None:
    """The new weight has the structure, shapes, dtypes and devices of the old one, and no gradient attached.
    Arguments and exceptions as `check_preserves_weight`.

    Example:
        >>> import dynlora_fn as dl
        >>> check_keeps_structure(dl.merge)
    """

    def check(params: Any, *rest: Any) -> None:
        for path, new, old in pairs(new_params(transform(params, *rest)), params):
            if isinstance(old, Tensor):
                assert isinstance(new, Tensor), f"{path} is {type(new).__name__} instead of a tensor"
                assert kind(new) == kind(old), f"{path} is {kind(new)} instead of {kind(old)}"
                assert new.requires_grad == old.requires_grad, f"{path} now requires a gradient"

    hold("structure, shapes, dtypes and devices are kept", check, arguments_of(transform, arguments), examples)


def check_deterministic(transform: Transform, *, arguments: Arguments = None, examples: int | None = None) -> None:
    """Equal arguments give equal bits, whatever the global random state and the memory that the arguments lie in.
    Arguments and exceptions as `check_preserves_weight`.

    Example:
        >>> import dynlora_fn as dl
        >>> check_deterministic(dl.switch)
    """

    def check(*given: Any) -> None:
        results = []
        with torch.random.fork_rng(devices=[]):
            for seed in range(2):
                torch.manual_seed(seed)
                results.append(transform(*tree_map(_copy, given)))
        assert_same(results[1], results[0])

    hold("equal arguments give equal bits", check, arguments_of(transform, arguments), examples)


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
