"""States of optimizers, the library's and others, after some steps."""

from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map

from dynlora_fn import Factors
from dynlora_fn.optim import AdamWState, FreezeState, adamw, register_state
from dynlora_fn.testing import Shape, low_rank, normal


class Record(NamedTuple):
    """A state whose `velocity` is declared a first moment.

    Its other field is not declared.
    """

    velocity: Any
    other: Any = None


register_state(Record, {"velocity": "first_moment"})


def filled(trainable: Any, seed: int = 0) -> Any:
    """Return a tree like the parameters that is nowhere zero."""
    return tree_map(lambda leaf: normal(seed, *leaf.shape).abs() + 1, dict(trainable))


def per_vector(trainable: Any) -> Any:
    """Return integers from 1 on, in the shapes of step counts."""
    counts = tree_map(lambda leaf: leaf + 7, adamw().init(trainable).inner.count)
    return {name: count for name, count in counts.items() if isinstance(count, Factors)}


def adamw_state(trainable: Any) -> FreezeState:
    counts = {**per_vector(trainable), "bias": torch.tensor(3)}
    return FreezeState(AdamWState(filled(trainable), filled(trainable, 1), counts), per_vector(trainable))


def trees_of(opt_state: Any) -> dict[str, dict[str, Any]]:
    """Return the trees of AdamW's state by field.

    They are joined over the labels of `multi_transform`.
    """
    states = [opt_state] if isinstance(opt_state, FreezeState) else list(opt_state.values())
    trees = [{**state.inner._asdict(), "frozen_for": state.frozen_for} for state in states]
    return {field: {name: leaf for tree in trees for name, leaf in tree[field].items()} for field in trees[0]}


def updated_state(transform: Any) -> Any:
    def make(trainable: Any) -> Any:
        state = transform.init(trainable)
        for seed in range(2):
            grads = tree_map(lambda leaf: normal(seed, *leaf.shape), dict(trainable))  # noqa: B023, called at once
            _, state = transform.update(grads, state, trainable, lr=0.1)
        return state

    return make


SWITCH = {"b": [0, 3], "a": [2], "frozen_for": 5}


def weights() -> dict[str, Any]:
    return {"w": low_rank(Shape(5, 6, 4), seed=0), "bias": normal(1, 5), "other": low_rank(Shape(3, 4, 2), seed=1)}
