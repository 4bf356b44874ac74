"""The stateful machine: transforms in any order, compared with a dense model.

The dense model, called the shadow, is in float64.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from torch import Tensor

from dynlora_fn._core._stacking import unstack
from dynlora_fn._core._torch import keystr, tree_flatten, tree_flatten_with_path, tree_map, tree_unflatten
from dynlora_fn._core._tree import combine, partition, whole_factors
from dynlora_fn._core._types import Plan
from dynlora_fn.bases._base import as_base
from dynlora_fn.bases._defer import defer, fold_pending
from dynlora_fn.bases._formats import FORMATS
from dynlora_fn.bases._quantize import quantize
from dynlora_fn.bases._residual import ResidualKind
from dynlora_fn.interop._safetensors import open_weights
from dynlora_fn.interop._save import save_weights
from dynlora_fn.nn._call import call
from dynlora_fn.nn._value_and_grad import value_and_grad
from dynlora_fn.optim._adamw import AdamWState
from dynlora_fn.optim._freeze import FreezeState
from dynlora_fn.optim._project_state import project_optimizer_state
from dynlora_fn.optim._transform import apply_updates
from dynlora_fn.parallel._gloo import register_gloo
from dynlora_fn.parallel._shard import shard, unshard
from dynlora_fn.switching._switch import switch
from dynlora_fn.switching._weight import merge
from dynlora_fn.testing._compare import assert_same
from dynlora_fn.testing._shadow import exact_weight, product, seen_weight
from dynlora_fn.testing._shadowed_model import ShadowedModel
from dynlora_fn.testing._small_model import (
    STACK,
    are_alike,
    has_pending,
    is_sharded,
    map_bases,
    stacked,
    unstacked,
)
from dynlora_fn.testing._strategies import plans
from dynlora_fn.testing._values import RESIDUALS, normal


class TransformMachine(ShadowedModel):
    """A state machine that runs transforms in any order and checks the weights.

    After each transform the weights are compared with a dense model in float64, the shadow. The transforms are init,
    step, switch, merge, quantize, defer, stack and unstack, save and load, shard and gather.

    The shadow changes only in optimizer steps, by the difference of the products of the factors. The weights may differ
    from it by the sum of the roundings of all folds (see `rounding`). Add a transform as a rule of a subclass::

        class Mine(TransformMachine):
            @rule()
            def reorder(self):
                self.keeps({name: my_transform(param) for name, param in self.params.items()})

        TestMine = Mine.TestCase
    """

    @rule(seed=st.integers(0, 1000))
    def step(self, seed: int) -> None:
        """Compare a forward and backward pass with the dense model, then update both."""
        trainable, frozen = partition(self.params)
        dtype = self.bias.dtype
        x, cotangent = normal(seed, 3, 32, dtype=dtype), normal(seed + 1, 3, 8, dtype=dtype)

        def loss(trainable: Any) -> Tensor:
            total: Tensor = (call(self.model, combine(trainable, frozen), x) * cotangent).sum()
            return total

        value, grads = value_and_grad(loss)(trainable)
        self.compare_with_dense(value, unstacked(grads) if STACK in grads else grads, x, cotangent)
        before = {name: product(whole_factors(param), param.divisor) for name, param in self.weights().items()}
        updates, self.opt_state = self.optimizer.update(grads, self.opt_state, trainable, lr=1e-2)
        trainable = apply_updates(trainable, updates)
        self.params = combine(trainable, frozen)
        for name, param in self.weights().items():
            self.shadow[name] += product(whole_factors(param), param.divisor) - before[name]
        self.shadow["head.bias"] = self.bias.double()

    @rule(data=st.data())
    def switch(self, data: st.DataObject) -> None:
        self._switch(data.draw(plans(self.params)))

    @rule()
    def switch_by_schedule(self) -> None:
        self._switch(self.schedule(self.schedule_step, self.params))
        self.schedule_step += 1

    def _switch(self, plan: Mapping[str, Plan]) -> None:
        self.keeps(switch(self.params, plan).params, exact_factors=True)
        self.opt_state = project_optimizer_state(self.opt_state, plan)

    @rule(data=st.data())
    def switch_there_and_back(self, data: st.DataObject) -> None:
        plan = data.draw(plans(self.params))
        factors = partition(self.params).trainable
        there = switch(self.params, plan)
        self.keeps(there.params, exact_factors=True)
        self.keeps(switch(self.params, plan, incoming=there.outgoing).params, exact_factors=True)
        assert_same(partition(self.params).trainable, factors)

    @rule()
    def merge(self) -> None:
        self.keeps(merge(self.params))

    @precondition(lambda self: self.every(lambda param: not (has_pending(param) or is_sharded(param))))
    @rule(kind=st.sampled_from(list(FORMATS)), residual=st.sampled_from(RESIDUALS))
    def quantize(self, kind: str, residual: ResidualKind) -> None:
        self.keeps(quantize(self.params, kind, residual=residual))

    @precondition(lambda self: self.every(lambda param: not has_pending(param)))
    @rule()
    def defer(self) -> None:
        rank = self.weights()["head.weight"].factors.b.shape[-1]
        self.keeps(defer(self.params, vectors=2 * rank))

    @precondition(lambda self: self.every(has_pending))
    @rule(goes_on=st.booleans())
    def fold_pending(self, goes_on: bool) -> None:
        self.keeps(fold_pending(self.params))
        if not goes_on:
            self.params = map_bases(lambda base: as_base(base).folded, self.params)

    @precondition(lambda self: STACK in self.params)
    @rule()
    def unstack(self) -> None:
        before = self.weights()
        self.params = tree_map(torch.clone, unstack(self.params))
        self.opt_state = self._map_state(unstacked)
        assert_same(self.weights(), before)

    @precondition(lambda self: STACK not in self.params and are_alike(self.params))
    @rule()
    def stack(self) -> None:
        before = self.weights()
        self.params = stacked(self.params)
        self.opt_state = self._map_state(stacked)
        assert_same(self.weights(), before)

    def _map_state(self, change: Callable[[Any], Any]) -> FreezeState:
        """Apply `change` to each tree by parameter name in the state of the optimizer."""
        inner, frozen_for = self.opt_state
        return FreezeState(AdamWState(*(change(tree) for tree in inner)), change(frozen_for))

    @rule()
    def save_and_load(self) -> None:
        state = self.params, self.opt_state
        named = {keystr(path): leaf for path, leaf in tree_flatten_with_path(state)[0]}
        with TemporaryDirectory() as folder:
            save_weights(named, Path(folder) / "state.safetensors")
            saved = dict(open_weights(Path(folder) / "state.safetensors"))
        loaded = tree_unflatten([saved[name] for name in named], tree_flatten(state)[1])
        assert_same(loaded, state)
        self.params, self.opt_state = loaded

    @precondition(lambda self: not self.every(is_sharded))
    @rule()
    def shard(self) -> None:
        """Shard over the default group.

        If there is no group, start one of only this process.
        """
        if not torch.distributed.is_initialized():
            store = torch.distributed.HashStore()  # type: ignore[attr-defined]
            torch.distributed.init_process_group(register_gloo(), store=store, rank=0, world_size=1)
            self.has_group = True
        self.params = shard(self.params, torch.distributed.group.WORLD)  # type: ignore[arg-type]

    @precondition(lambda self: self.every(is_sharded))
    @rule()
    def gather(self) -> None:
        before = self._values()
        self.params = unshard(self.params)
        assert_same(self._values(), before)

    def _values(self) -> list[tuple[Tensor, Tensor]]:
        """Return for each weight the exact value and the value that products use."""
        return [(exact_weight(param), seen_weight(param)) for param in self.weights().values()]
