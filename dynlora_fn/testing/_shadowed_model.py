"""The parameters of the stateful machine, and their comparison with the shadow.

The shadow is a dense model in float64.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant
from torch import Tensor

from dynlora_fn._core._stacking import unstack
from dynlora_fn._core._torch import tree_map
from dynlora_fn._core._tree import partition, whole_factors
from dynlora_fn._core._types import LowRank, Param, sides_of
from dynlora_fn.bases._base import as_base
from dynlora_fn.bases._pending import rank_with_pending
from dynlora_fn.interop._init import Trained, init
from dynlora_fn.optim._adamw import adamw
from dynlora_fn.optim._freeze import FreezeState
from dynlora_fn.switching._schedule import Schedule
from dynlora_fn.switching._weight import Start
from dynlora_fn.testing._compare import assert_within, eps
from dynlora_fn.testing._shadow import exact_weight, factor_rounding, half_step, rounding, seen_weight
from dynlora_fn.testing._small_model import Net, dense, magnitude
from dynlora_fn.testing._values import STORAGES, Storage, normal


class ShadowedModel(RuleBasedStateMachine):
    """A machine without rules, which compares a model with its shadow.

    It draws the model, and compares both after every rule of a subclass.
    """

    storages: Sequence[Storage] = STORAGES  # a subclass may draw from others
    alphas: Sequence[float] = (1.0,)  # a subclass may draw from others
    trained: Sequence[Trained] = ("both",)  # a subclass may draw from others
    params: dict[str, Param]
    opt_state: FreezeState  # around an `AdamWState`
    shadow: dict[str, Tensor]  # dense weights in float64, by the names of the model
    allowed: dict[str, Tensor]  # the largest error of each entry

    def __init__(self) -> None:
        super().__init__()
        self.optimizer, self.schedule, self.schedule_step = adamw(), Schedule(interval=2, freeze=1), 0
        self.has_group = False

    @initialize(
        rank=st.integers(1, 8),
        seed=st.integers(0, 1000),
        storage=st.runner().flatmap(lambda machine: st.sampled_from(machine.storages)),
        alpha=st.runner().flatmap(lambda machine: st.sampled_from(machine.alphas)),
        trained=st.runner().flatmap(lambda machine: st.sampled_from(machine.trained)),
        dtype=st.sampled_from([torch.float32, torch.float64]),
        start=st.sampled_from(["switchlora", "lora"]),
        is_stacked=st.booleans(),
    )
    def init(
        self,
        rank: int,
        seed: int,
        storage: Storage,
        dtype: torch.dtype,
        start: Start,
        is_stacked: bool,
        alpha: float = 1.0,
        trained: Trained = "both",
    ) -> None:
        """Draw the model, its parameters and the state of the optimizer."""
        self.model = Net().to(dtype)
        with torch.no_grad():
            for index, parameter in enumerate(self.model.parameters()):
                parameter.copy_(normal(seed + index, *parameter.shape, dtype=dtype) / 4)
        base_settings: dict[str, Any] = {"base": storage.kind, "residual": storage.residual}
        if storage.kind in ("float64", "float32"):
            base_settings = {"base_dtype": getattr(torch, storage.kind)}
        weights = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        targets = ["*.weight"]
        self.params = init(
            self.model,
            rank=rank,
            alpha=alpha,
            seed=seed,
            targets=targets,
            start=start,
            trained=trained,
            dtype=dtype,
            stack=is_stacked,
            **base_settings,
        )
        self.opt_state = self.optimizer.init(partition(self.params).trainable)
        self.shadow = {name: weight.double().clone() for name, weight in weights.items()}
        self.allowed = {}
        for name, param in self.weights().items():
            dense = LowRank(weights[name], tree_map(torch.zeros_like, param.factors), param.seed)
            self.allowed[name] = rounding(dense, param)

    def weights(self) -> dict[str, LowRank]:
        """Return the low-rank weights by the names of the model."""
        return {name: param for name, param in unstack(self.params).items() if isinstance(param, LowRank)}

    def keeps(self, params: Mapping[str, Param], *, folds: int = 1, exact_factors: bool = False) -> None:
        """Take new parameters whose weights must be the same, except for roundings.

        Roundings are bounded as in `check_preserves_weight`.

        Args:
            params: The new parameters.
            folds: How often the transform folds into a base.
            exact_factors: Whether new factors are exact, so that only folds round.
        """
        before = self.weights()
        self.params = dict(params)
        for name, param in self.weights().items():
            self.allowed[name] = self.allowed[name] + rounding(before[name], param, folds=folds)
            if not exact_factors:
                self.allowed[name] = self.allowed[name] + factor_rounding(before[name], param)

    @property
    def bias(self) -> Tensor:
        """The only full-rank parameter."""
        bias = self.params["head.bias"]
        assert isinstance(bias, Tensor)
        return bias

    def every(self, kind: Callable[[LowRank], bool]) -> bool:
        """Return whether a predicate `kind` is true for every low-rank parameter."""
        return all(kind(param) for param in self.params.values() if isinstance(param, LowRank))

    def compare_with_dense(self, value: Tensor, grads: Mapping[str, Any], x: Tensor, cotangent: Tensor) -> None:
        """Compare value and gradients with the dense model, at the weights products use.

        Rounding errors are relative to the same sums with positive terms. The longest sum has three products of 32
        terms, and the vectors of each weight.
        """
        weights = self.weights()
        dense_weights = {name: seen_weight(param) for name, param in weights.items()}
        dense_weights["head.bias"] = self.bias.double()
        wanted, wanted_grads = dense(dense_weights, x.double(), cotangent.double())
        magnitude_of_value, magnitude_of_grads = dense(
            {name: magnitude(weights.get(name), weight) for name, weight in dense_weights.items()},
            x.double().abs(),
            cotangent.double().abs(),
        )
        vectors = rank_with_pending(next(iter(weights.values())))
        error = 2 * (3 * (32 + 2 * vectors) + 24 + 16) * eps(x.dtype)
        assert_within(value, wanted, error * magnitude_of_value)
        for name, param in weights.items():
            (b, a), divisor = (leaf.double() for leaf in whole_factors(param)), param.divisor
            bound, size = error * magnitude_of_grads[name], abs(divisor)
            assert_within(grads[name].b, wanted_grads[name] @ a.mT / divisor, bound @ a.abs().mT / size)
            if len(sides_of(grads[name])) == 2:
                assert_within(grads[name].a, b.mT @ wanted_grads[name] / divisor, b.abs().mT @ bound / size)

    @invariant()
    def compare(self) -> None:
        """Compare the weights with the shadow, and the shapes of moments with the factors.

        The weights that products use are compared with the exact weights.
        """
        for name, param in self.weights().items():
            weight = exact_weight(param)
            # The comparison itself rounds, too.
            slack = 128 * eps(torch.float64) * (weight.abs().amax() + self.allowed[name])
            assert_within(weight, self.shadow[name], self.allowed[name] + slack)
            assert_within(seen_weight(param), weight, half_step(as_base(param.base).folded) + slack)
        trainable = partition(self.params).trainable
        shapes = [tree_map(lambda leaf: leaf.shape, tree) for tree in (self.opt_state.inner.mu, trainable)]
        assert shapes[0] == shapes[1], f"moments of {shapes[0]} for {shapes[1]}"

    def teardown(self) -> None:
        if self.has_group:
            torch.distributed.destroy_process_group()
