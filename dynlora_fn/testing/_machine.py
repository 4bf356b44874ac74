"""Transforms in any order, on a small model beside its dense shadow in float64."""

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from dynlora_fn._core._stacking import unstack
from dynlora_fn._core._torch import keystr, tree_flatten, tree_flatten_with_path, tree_map, tree_unflatten
from dynlora_fn._core._tree import combine, partition
from dynlora_fn._core._types import LowRank, Param, Plan
from dynlora_fn.bases._deferred import defer, fold_pending
from dynlora_fn.bases._pending import without_pending
from dynlora_fn.bases._quantize import quantize
from dynlora_fn.bases._quantized import ResidualKind
from dynlora_fn.bases._types import Deferred, Sharded
from dynlora_fn.interop._init import init
from dynlora_fn.interop._safetensors import open_weights, save_weights
from dynlora_fn.nn._call import call
from dynlora_fn.nn._value_and_grad import value_and_grad
from dynlora_fn.optim._adamw import AdamWState, adamw
from dynlora_fn.optim._project_state import project_optimizer_state
from dynlora_fn.optim._transform import apply_updates
from dynlora_fn.parallel._shard import shard, unshard
from dynlora_fn.switching._schedule import Schedule
from dynlora_fn.switching._switch import switch
from dynlora_fn.switching._weight import Start, merge
from dynlora_fn.testing._compare import assert_same, assert_within, eps
from dynlora_fn.testing._shadow import exact_weight, half_step, product, rounding, seen_weight
from dynlora_fn.testing._small_model import (
    STACK,
    Net,
    all_factors,
    are_alike,
    dense,
    is_sharded,
    magnitude,
    map_bases,
    stacked,
    unstacked,
)
from dynlora_fn.testing._strategies import plans
from dynlora_fn.testing._values import RESIDUALS, STORAGES, Storage, normal


class TransformMachine(RuleBasedStateMachine):
    """Runs init, step, switch, merge, quantize, defer, stack and unstack, save and load, shard and gather in any order,
    and compares with a dense model in float64 after each of them.

    The shadow takes part in optimizer steps alone, by the difference of the factors' products. What the weights may be
    off by is the sum of what each fold may round (see `rounding`). To add a transform of one's own::

        class Mine(TransformMachine):
            @rule()
            def reorder(self):
                self.keeps({name: my_transform(param) for name, param in self.params.items()})

        TestMine = Mine.TestCase
    """

    params: dict[str, Param]
    opt_state: AdamWState
    shadow: dict[str, Tensor]  # by the model's own names, float64
    allowed: dict[str, Tensor]  # that each entry may be off by

    def __init__(self) -> None:
        super().__init__()
        self.optimizer, self.schedule, self.number = adamw(), Schedule(interval=2, freeze=1), 0
        self.has_group = False

    @initialize(
        rank=st.integers(1, 8),
        seed=st.integers(0, 1000),
        storage=st.sampled_from(STORAGES),
        dtype=st.sampled_from([torch.float32, torch.float64]),
        start=st.sampled_from(["switchlora", "lora"]),
        is_stacked=st.booleans(),
    )
    def init(self, rank: int, seed: int, storage: Storage, dtype: torch.dtype, start: Start, is_stacked: bool) -> None:
        self.model = Net().to(dtype)
        with torch.no_grad():
            for number, own in enumerate(self.model.parameters()):
                own.copy_(normal(seed + number, *own.shape, dtype=dtype) / 4)
        how: dict[str, Any] = {"base": storage.kind, "residual": storage.residual}
        if storage.kind in ("float64", "float32"):
            how = {"base_dtype": getattr(torch, storage.kind)}
        weights = {name: own.detach() for name, own in self.model.named_parameters()}
        targets = ["*.weight"]
        self.params = init(
            self.model, rank=rank, seed=seed, targets=targets, start=start, dtype=dtype, stack=is_stacked, **how
        )
        self.opt_state = self.optimizer.init(partition(self.params).trainable)
        self.shadow = {name: weight.double().clone() for name, weight in weights.items()}
        self.allowed = {}
        for name, param in self.weights().items():
            dense = LowRank(weights[name], tree_map(torch.zeros_like, param.factors), param.seed)
            self.allowed[name] = rounding(dense, param)

    # --- what rules are made of

    def weights(self) -> dict[str, LowRank]:
        """The low-rank ones by the model's own names."""
        return {name: param for name, param in unstack(self.params).items() if isinstance(param, LowRank)}

    def keeps(self, params: Mapping[str, Param], *, folds: int = 1) -> None:
        """Takes the new parameters, which are the same weights but for what so many folds round."""
        before = self.weights()
        self.params = dict(params)
        for name, param in self.weights().items():
            self.allowed[name] = self.allowed[name] + rounding(before[name], param, folds=folds)

    @property
    def bias(self) -> Tensor:
        bias = self.params["head.bias"]
        assert isinstance(bias, Tensor)
        return bias

    def every(self, kind: Callable[[LowRank], bool]) -> bool:
        return all(kind(param) for param in self.params.values() if isinstance(param, LowRank))

    # --- rules

    @rule(seed=st.integers(0, 1000))
    def step(self, seed: int) -> None:
        """Forward and backward pass against the dense model, then an update, which the shadow follows."""
        trainable, frozen = partition(self.params)
        dtype = self.bias.dtype
        x, cotangent = normal(seed, 3, 32, dtype=dtype), normal(seed + 1, 3, 8, dtype=dtype)

        def loss(trainable: Any) -> Tensor:
            total: Tensor = (call(self.model, combine(trainable, frozen), x) * cotangent).sum()
            return total

        value, grads = value_and_grad(loss)(trainable)
        self._compare(value, unstacked(grads) if STACK in grads else grads, x, cotangent)
        before = {name: product(param.factors, param.factors.b.shape[-1]) for name, param in self.weights().items()}
        updates, self.opt_state = self.optimizer.update(grads, self.opt_state, trainable, lr=1e-2)
        trainable = apply_updates(trainable, updates)
        self.params = combine(trainable, frozen)
        for name, param in self.weights().items():
            self.shadow[name] += product(param.factors, param.factors.b.shape[-1]) - before[name]
        self.shadow["head.bias"] = self.bias.double()

    def _compare(self, value: Tensor, grads: Mapping[str, Any], x: Tensor, cotangent: Tensor) -> None:
        """With the dense weights that products see. Rounding errors are relative to the same sums of absolute terms, of
        which the longest is three products of 32 and the vectors of each weight."""
        weights = self.weights()
        wide = {name: seen_weight(param) for name, param in weights.items()}
        wide["head.bias"] = self.bias.double()
        right, right_grads = dense(wide, x.double(), cotangent.double())
        most, most_grads = dense(
            {name: magnitude(weights.get(name), weight) for name, weight in wide.items()},
            x.double().abs(),
            cotangent.double().abs(),
        )
        vectors = sum(factors.b.shape[-1] for factors in all_factors(next(iter(weights.values()))))
        share = 2 * (3 * (32 + 2 * vectors) + 24 + 16) * eps(x.dtype)
        assert_within(value, right, share * most)
        for name, param in weights.items():
            (b, a), rank = (leaf.double() for leaf in param.factors), param.factors.b.shape[-1]
            assert_within(grads[name].b, right_grads[name] @ a.mT / rank, share * most_grads[name] @ a.abs().mT / rank)
            assert_within(grads[name].a, b.mT @ right_grads[name] / rank, share * b.abs().mT @ most_grads[name] / rank)

    @rule(data=st.data())
    def switch(self, data: st.DataObject) -> None:
        self._switch(data.draw(plans(self.params)))

    @rule()
    def switch_by_schedule(self) -> None:
        self._switch(self.schedule(self.number, self.params))
        self.number += 1

    def _switch(self, plan: Mapping[str, Plan]) -> None:
        self.keeps(switch(self.params, plan).params)
        self.opt_state = project_optimizer_state(self.opt_state, plan)

    @rule(data=st.data())
    def switch_there_and_back(self, data: st.DataObject) -> None:
        plan = data.draw(plans(self.params))
        factors = partition(self.params).trainable
        there = switch(self.params, plan)
        self.keeps(there.params)
        self.keeps(switch(self.params, plan, incoming=there.outgoing).params)
        assert_same(partition(self.params).trainable, factors)

    @rule()
    def merge(self) -> None:
        self.keeps(merge(self.params))

    @precondition(lambda self: self.every(lambda param: not isinstance(param.base, Deferred | Sharded)))
    @rule(
        kind=st.sampled_from(["int8", "float8", "nf4", "bfloat16", "nvfp4", "mxfp4"]),
        residual=st.sampled_from(RESIDUALS),
    )
    def quantize(self, kind: str, residual: ResidualKind) -> None:
        self.keeps(quantize(self.params, kind, residual=residual))

    @precondition(lambda self: self.every(lambda param: not isinstance(param.base, Deferred)))
    @rule()
    def defer(self) -> None:
        rank = self.weights()["head.weight"].factors.b.shape[-1]
        self.keeps(defer(self.params, vectors=2 * rank))

    @precondition(lambda self: self.every(lambda param: isinstance(param.base, Deferred)))
    @rule(goes_on=st.booleans())
    def fold_pending(self, goes_on: bool) -> None:
        self.keeps(fold_pending(self.params))
        if not goes_on:
            self.params = map_bases(lambda base: base.base, self.params)

    @precondition(lambda self: STACK in self.params)
    @rule()
    def unstack(self) -> None:
        before = self.weights()
        self.params = tree_map(torch.clone, unstack(self.params))
        self.opt_state = AdamWState(*(unstacked(tree) for tree in self.opt_state))
        assert_same(self.weights(), before)

    @precondition(lambda self: STACK not in self.params and are_alike(self.params))
    @rule()
    def stack(self) -> None:
        before = self.weights()
        self.params = stacked(self.params)
        self.opt_state = AdamWState(*(stacked(tree) for tree in self.opt_state))
        assert_same(self.weights(), before)

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
        """Over the group that this process is in, or one of its own: all that is done to rows, and no other process."""
        if not torch.distributed.is_initialized():
            store = torch.distributed.HashStore()  # type: ignore[attr-defined]
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
            self.has_group = True
        self.params = shard(self.params, torch.distributed.group.WORLD)  # type: ignore[arg-type]

    @precondition(lambda self: self.every(is_sharded))
    @rule()
    def gather(self) -> None:
        before = self._numbers()
        self.params = unshard(self.params)
        assert_same(self._numbers(), before)

    def _numbers(self) -> list[tuple[Tensor, Tensor]]:
        """What is kept and what products see, whichever process holds it."""
        return [(exact_weight(param), seen_weight(param)) for param in self.weights().values()]

    # --- after every rule

    @invariant()
    def compare(self) -> None:
        """Weights with the shadow's, what products see with what is kept, and the state with what is trained."""
        for name, param in self.weights().items():
            weight = exact_weight(param)
            own = 128 * eps(torch.float64) * (weight.abs().amax() + self.allowed[name])  # of the comparison itself
            assert_within(weight, self.shadow[name], self.allowed[name] + own)
            assert_within(seen_weight(param), weight, half_step(without_pending(param)) + own)
        trainable = partition(self.params).trainable
        shapes = [tree_map(lambda leaf: leaf.shape, tree) for tree in (self.opt_state.mu, trainable)]
        assert shapes[0] == shapes[1], f"moments of {shapes[0]} for {shapes[1]}"

    def teardown(self) -> None:
        if self.has_group:
            torch.distributed.destroy_process_group()
