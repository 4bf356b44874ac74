"""Check transforms of a weight.

A transform takes a weight, or a weight and a plan for it. It returns the new weight, or a tuple that starts with it, as
`merge` and `switch` do. To check a transform of parameters by name, pass ``arguments=trees()``.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dynlora_fn._core._check import check_flag, check_integer
from dynlora_fn._core._torch import tree_map
from dynlora_fn._core._tree import tensor_of
from dynlora_fn._core._types import LowRank, Params
from dynlora_fn.testing._compare import assert_same, assert_within, eps, kind, pairs, untouched
from dynlora_fn.testing._promises import Arguments, arguments_of, hold, new_params, weights_of
from dynlora_fn.testing._shadow import exact_weight, factor_rounding, rounding

Transform = Callable[..., Any]


def check_preserves_weight(
    transform: Transform,
    *,
    folds: int = 1,
    exact_factors: bool = False,
    arguments: Arguments = None,
    examples: int | None = None,
) -> None:
    """Check that a transform does not change the weight, except for roundings.

    Folds and new factors may be rounded. A full-rank parameter must stay, except for one rounding to its dtype. The
    weight is compared in float64, with the residual of a quantized base and with pending folds::

        weight = base + alpha / rank * b @ a

    Args:
        transform: A function of a weight, or of a weight and a plan.
        folds: How often the transform folds into a base. Each fold rounds once.
        exact_factors: Whether new factors are exact, as the vectors that enter in `switch`, so that only folds round.
            Default False allows two roundings to the dtype of the factors for each entry that has changed, as after QR
            or balancing.
        arguments: A strategy for its arguments, or a tuple of them. Default None draws weights of all kinds, with an
            alpha of 1 and two trained sides.
        examples: The number of examples to draw. Default None takes it from the hypothesis profile.

    Raises:
        BrokenPromiseError: If the promise is broken. The message gives the smallest example, and the largest breach
            among all examples: error over bound.
        TypeError: If an argument of the checker has a wrong type.
        ValueError: If `folds` or `examples` is out of range, or `arguments` is empty.

    Example:
        >>> import dynlora_fn as dl
        >>> check_preserves_weight(dl.switch)
    """
    folds = check_integer("folds", folds, least=0)
    check_flag("exact_factors", exact_factors)

    def check(params: Any, *plan: Any) -> None:
        result = new_params(transform(params, *plan))
        after = weights_of(result)
        for name, before in weights_of(params).items():
            assert name in after, f"the low-rank weight {name!r} is missing from the result"
            bound = rounding(before, after[name], folds=folds)
            if not exact_factors:
                bound = bound + factor_rounding(before, after[name])
            assert_within(exact_weight(after[name]), exact_weight(before), bound)
        if isinstance(params, Mapping):
            _check_full_rank(params, result)

    hold("the weight does not change", check, arguments_of(transform, arguments), examples)


def _check_full_rank(params: Params, result: Any) -> None:
    """Raise if a full-rank parameter is missing or has changed.

    One rounding to its dtype is no change.
    """
    for name, before in params.items():
        if isinstance(before, LowRank):
            continue
        is_there = isinstance(result, Mapping) and name in result
        assert is_there, f"the parameter {name!r} is missing from the result"
        old, new = tensor_of(before), result[name]
        new = exact_weight(new) if isinstance(new, LowRank) else tensor_of(new)
        precision = eps(new.dtype) if new.is_floating_point() else 0.0
        assert_within(new, old, precision * old.abs().double())


def check_pure(transform: Transform, *, arguments: Arguments = None, examples: int | None = None) -> None:
    """Check that a transform changes no argument and draws no global random number.

    Writing into an argument is an error even if its values stay the same.

    Args:
        transform: A function of a weight, or of a weight and a plan.
        arguments: A strategy for its arguments, or a tuple of them. Default None draws weights of all kinds, with an
            alpha of 1 and two trained sides.
        examples: The number of examples to draw. Default None takes it from the hypothesis profile.

    Raises:
        BrokenPromiseError: If the promise is broken. The message gives the smallest example.

    Example:
        >>> import dynlora_fn as dl
        >>> check_pure(dl.switch)
    """

    def check(*args: Any) -> None:
        state = torch.get_rng_state()
        with untouched(*args):
            transform(*args)
        assert torch.equal(state, torch.get_rng_state()), "a random number was drawn from torch's global generator"

    hold("arguments and global state do not change", check, arguments_of(transform, arguments), examples)


def check_keeps_structure(transform: Transform, *, arguments: Arguments = None, examples: int | None = None) -> None:
    """Check that the new weight has the structure and kinds of tensors of the old one.

    Each new tensor must have the shape, dtype and device of the old tensor, and the same `requires_grad`.

    Args:
        transform: A function of a weight, or of a weight and a plan.
        arguments: A strategy for its arguments, or a tuple of them. Default None draws weights of all kinds, with an
            alpha of 1 and two trained sides.
        examples: The number of examples to draw. Default None takes it from the hypothesis profile.

    Raises:
        BrokenPromiseError: If the promise is broken. The message gives the smallest example.

    Example:
        >>> import dynlora_fn as dl
        >>> check_keeps_structure(dl.merge)
    """

    def check(params: Any, *plan: Any) -> None:
        for path, new, old in pairs(new_params(transform(params, *plan)), params):
            if isinstance(old, Tensor):
                assert isinstance(new, Tensor), f"{path} is {type(new).__name__} instead of a tensor"
                assert kind(new) == kind(old), f"{path} is {kind(new)} instead of {kind(old)}"
                assert new.requires_grad == old.requires_grad, f"{path} now requires a gradient"

    hold("structure, shapes, dtypes and devices do not change", check, arguments_of(transform, arguments), examples)


def check_deterministic(transform: Transform, *, arguments: Arguments = None, examples: int | None = None) -> None:
    """Check that equal arguments give equal bits.

    The result must not depend on the global random state, nor on the memory in which arguments are stored.

    Args:
        transform: A function of a weight, or of a weight and a plan.
        arguments: A strategy for its arguments, or a tuple of them. Default None draws weights of all kinds, with an
            alpha of 1 and two trained sides.
        examples: The number of examples to draw. Default None takes it from the hypothesis profile.

    Raises:
        BrokenPromiseError: If the promise is broken. The message gives the smallest example.

    Example:
        >>> import dynlora_fn as dl
        >>> check_deterministic(dl.switch)
    """

    def check(*args: Any) -> None:
        results = []
        with torch.random.fork_rng(devices=[]):
            for seed in range(2):
                torch.manual_seed(seed)
                results.append(transform(*tree_map(_copy, args)))
        assert_same(results[1], results[0])

    hold("equal arguments give equal bits", check, arguments_of(transform, arguments), examples)


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
