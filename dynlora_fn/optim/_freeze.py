"""`freeze_counterparts`: freeze factor vectors in any optimizer."""

from collections.abc import Collection, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynlora_fn._core._check_trees import check_trainable
from dynlora_fn._core._torch import can_read_all, flatten_tensors
from dynlora_fn._core._types import AnyFactors, Factors, OneSidedFactors, Trainable, is_factors, sides_of
from dynlora_fn.optim._check_state import check_state
from dynlora_fn.optim._elementwise import elementwise
from dynlora_fn.optim._roles import register_state
from dynlora_fn.optim._transform import Rate, Transform, Tree, Updates, check_transform, check_update, check_updates


class FreezeState(NamedTuple):
    """The state of `freeze_counterparts`."""

    inner: Any  # the state of the wrapped optimizer
    # the updates for which each vector stays frozen, int32: ``Factors(b=(*stack, 1, rank), a=(*stack, rank, 1))``
    frozen_for: dict[str, AnyFactors]


register_state(FreezeState, {"frozen_for": "frozen_for"})


def freeze_counterparts(inner: Transform) -> Transform:
    """Wrap an optimizer so that it does not move frozen vectors.

    The wrapped optimizer gets a zero gradient for a frozen vector, and its update of the vector is replaced by zero. So
    a vector does not move for exactly as many updates as `project_optimizer_state` sets after a switch. This does not
    depend on what the optimizer does with the state of the vector (arXiv:2406.06564, section 3.3). The optimizers of
    `dl.optim` are already wrapped. To freeze vectors in a chain of transforms, wrap the chain and not its members.

    Args:
        inner: The optimizer. Its state may be any state that `project_optimizer_state` can project.

    Returns:
        The optimizer. Its state is a `FreezeState` around the state of `inner`.

    Raises:
        TypeError: If `inner` is not a `Transform`. In `init` and `update`, if a leaf is not a tensor of a floating or
            complex dtype.
        ValueError: In `update`, if `grads` or the state does not have the names and shapes of `trainable`, or `lr` is
            negative or not finite.

    Example: An optimizer that returns the gradients as updates.
        >>> import torch
        >>> from dynlora_fn.optim import Transform, Updates
        >>> plain = Transform(
        ...     init=lambda trainable: None,
        ...     update=lambda grads, opt_state, trainable, *, lr: Updates(grads, opt_state),
        ... )
        >>> optimizer = freeze_counterparts(plain)
        >>> trainable = {"w": Factors(b=torch.ones(1, 2), a=torch.ones(2, 1))}
        >>> opt_state = optimizer.init(trainable)
        >>> opt_state.frozen_for["w"].b[0, 1] = 1  # freeze b[:, 1] for one update
        >>> for _ in range(2):
        ...     updates, opt_state = optimizer.update(trainable, opt_state, trainable, lr=0.1)
        ...     print(updates["w"].b)
        tensor([[1., 0.]])
        tensor([[1., 1.]])
    """

    check_transform("inner", inner)

    def init(trainable: Trainable) -> FreezeState:
        check_trainable("trainable", trainable)
        return FreezeState(inner.init(trainable), _no_vectors_frozen(trainable))

    def update(
        grads: Trainable, opt_state: FreezeState, trainable: Trainable, *, lr: Rate | Mapping[str, Rate]
    ) -> Updates:
        check_update(grads, trainable, lr)
        check_state(opt_state, FreezeState, trainable)
        frozen_for = opt_state.frozen_for
        moving = _names_that_move(frozen_for)
        updates, inner_state = inner.update(zero_frozen(grads, frozen_for, moving), opt_state.inner, trainable, lr=lr)
        check_updates("inner.update", updates, trainable)
        counting = {name: counts for name, counts in frozen_for.items() if name not in moving}
        new_state = FreezeState(inner_state, {**frozen_for, **_count_down(counting)})
        return Updates(zero_frozen(updates, frozen_for, moving), new_state)

    return Transform(init, update)


def zero_frozen(tree: Mapping[str, Any], frozen_for: Mapping[str, AnyFactors], moving: Collection[str] = ()) -> Tree:
    """Return gradients or updates with zeros for frozen vectors.

    Weights in `moving` have no frozen vectors, so they are returned unchanged.
    """
    factors = {name: leaf for name, leaf in tree.items() if name not in moving and is_factors(leaf)}
    return {**tree, **_zero_where_frozen(factors, small=frozen_for)}


def zero_counts(leaf: Any) -> AnyFactors | Tensor:
    """Return int32 zeros: one for each vector of factors, one for a full-rank tensor.

    The counts of sharded factors are not sharded.
    """
    if not is_factors(leaf):
        return torch.zeros((), dtype=torch.int32, device=leaf.device)
    (*stack, _, rank), zeros = leaf.b.shape, leaf.b.new_zeros
    b = zeros((*stack, 1, rank), dtype=torch.int32)
    if isinstance(leaf, OneSidedFactors):
        return leaf._replace(b=b)
    return Factors(b=b, a=zeros((*stack, rank, 1), dtype=torch.int32))


def _no_vectors_frozen(trainable: Trainable) -> dict[str, AnyFactors]:
    counts = {name: zero_counts(leaf) for name, leaf in trainable.items()}
    return {name: leaf for name, leaf in counts.items() if is_factors(leaf)}


def _names_that_move(frozen_for: Mapping[str, AnyFactors]) -> set[str]:
    """Return the names of weights whose counters are all zero.

    If the host would have to wait for the counters, or is tracing, no names are returned.
    """
    counts = [*chain.from_iterable(map(sides_of, frozen_for.values()))]
    if not counts or not can_read_all(counts):
        return set()
    if not flatten_tensors(counts).any():
        return set(frozen_for)
    return {name for name, counts in frozen_for.items() if not any(side.any() for side in sides_of(counts))}


@elementwise()
def _count_down(frozen_for: Any) -> Any:
    """Return the counters after one update, at least zero."""
    return (frozen_for - 1).clamp(min=0)


@elementwise(can_join=False)
def _zero_where_frozen(side: Tensor, frozen_for: Tensor) -> Tensor:
    return torch.where(frozen_for > 0, 0, side)
