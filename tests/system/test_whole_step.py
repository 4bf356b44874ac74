"""A complete training step against the slow reference, against plain LoRA, and against itself."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dynlora_fn import Factors, combine, unstack
from dynlora_fn.nn import _linear
from dynlora_fn.schedules import never
from dynlora_fn.testing import assert_same
from tests.support import reference
from tests.support.optimizer_states import trees_of
from tests.support.training import MAX_NORM, RANK, SWITCHING, TrainState, batches, make_run, run_for


def flat(state: TrainState) -> dict[str, Tensor]:
    """Return the state in the layout of `reference.flat`."""
    trees = {"": state.trainable, **{f".{field}": tree for field, tree in trees_of(state.opt_state).items()}}
    tensors = {}
    for suffix, tree in trees.items():
        for name, leaf in members(tree):
            sides = {f"{name}.b": leaf.b.mT, f"{name}.a": leaf.a} if isinstance(leaf, Factors) else {name: leaf}
            tensors |= {side + suffix: tensor for side, tensor in sides.items()}
    return tensors | {f"{name}.base": frozen.base for name, frozen in members(state.frozen)}


def members(tree: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the two members of each stack, and each single leaf. A stack of biases has one step count."""
    for name, leaf in tree.items():
        for index in range(2) if "*" in name else [0]:
            yield name.replace("*", str(index)), one_of(leaf, index) if "*" in name else leaf


def one_of(stack: Any, index: int) -> Any:
    return tree_map(lambda leaf: leaf[index] if leaf.ndim else leaf, stack)


def slow_plans(step: int, params: Any) -> dict[str, list[tuple[str, int, int, int]]]:
    """Return the plans of the reference: both layers of the stack share a plan."""
    switches = {
        name: [
            (side, slot, index, int(plan.frozen_for))
            for side, part in (("a", plan.a), ("b", plan.b))
            for slot, index, active in zip(*(leaf.tolist() for leaf in part), strict=True)
            if active
        ]
        for name, plan in SWITCHING(step, params).items()
    }
    stack = switches["layers.*.weight"]
    return {"layers.0.weight": stack, "layers.1.weight": stack, "head.weight": switches["head.weight"]}


def test_the_whole_step_equals_the_reference():
    """The run has clipping, weight decay, a stack, a changing learning rate, and switches on both sides."""
    run = make_run(SWITCHING, weight_decay=0.1)
    params = combine(run.state.trainable, run.state.frozen)
    parts = tree_map(torch.clone, unstack(params))
    weights = {
        name: reference.Weight(part.base, *part.factors, part.seed.item())
        for name, part in parts.items()
        if not isinstance(part, Tensor)
    }
    slow = reference.State(weights, {name: part for name, part in parts.items() if isinstance(part, Tensor)})
    norms, switched = [], 0
    for step, ((state, aux), (x, y, lr)) in enumerate(zip(run_for(run, 60), batches(60), strict=True)):

        def loss_fn(tensors, x=x, y=y):
            for layer in ("layers.0", "layers.1"):
                x = (x @ tensors[f"{layer}.weight"].T + tensors[f"{layer}.bias"]).tanh()
            return ((x @ tensors["head.weight"].T + tensors["head.bias"] - y) ** 2).mean()

        plans = slow_plans(step, params)
        options = reference.Options(lr=lr.item(), max_norm=MAX_NORM, weight_decay=0.1)
        loss = reference.train_step(slow, loss_fn, plans, options)
        assert abs(aux["loss"].item() - loss) < 1e-10
        torch.testing.assert_close(flat(state), reference.flat(slow), rtol=0, atol=1e-10, check_dtype=False)
        norms.append(aux["norm"].item())
        switched += sum(map(len, plans.values()))
    assert min(norms) < MAX_NORM < max(norms)  # clipped and not
    assert switched > 20


class PlainLoRA:
    """W + b a / r trained with AdamW, written in plain torch without stacks."""

    def __init__(self, state: TrainState, weight_decay: float):
        self.bases = {name: frozen.base for name, frozen in members(state.frozen)}
        leaves = (
            {f"{name}.b": leaf.b, f"{name}.a": leaf.a} if isinstance(leaf, Factors) else {name: leaf}
            for name, leaf in members(state.trainable)
        )
        self.leaves = {name: leaf.clone().requires_grad_() for group in leaves for name, leaf in group.items()}
        self.moments = {name: (torch.zeros_like(leaf), torch.zeros_like(leaf)) for name, leaf in self.leaves.items()}
        self.weight_decay, self.count = weight_decay, 0

    def linear(self, x: Tensor, name: str) -> Tensor:
        inner = nn.functional.linear(x, self.leaves[f"{name}.weight.a"]) / RANK
        outer = nn.functional.linear(inner, self.leaves[f"{name}.weight.b"])
        return nn.functional.linear(x, self.bases[f"{name}.weight"], self.leaves[f"{name}.bias"]) + outer

    def step(self, x: Tensor, y: Tensor, lr: Tensor) -> Tensor:
        hidden = self.linear(self.linear(x, "layers.0").tanh(), "layers.1").tanh()
        loss = (self.linear(hidden, "head") - y).square().mean()
        grads = torch.autograd.grad(loss, list(self.leaves.values()))
        self.count += 1
        with torch.no_grad():
            for (name, leaf), grad in zip(self.leaves.items(), grads, strict=True):
                mu, nu = self.moments[name]
                mu, nu = self.moments[name] = mu * 0.9 + grad * (1 - 0.9), nu * 0.999 + grad.square() * (1 - 0.999)
                first, second = (
                    -torch.expm1(torch.tensor(float(self.count)) * math.log(beta)) for beta in (0.9, 0.999)
                )
                update = mu / first / (nu.sqrt() / second.sqrt() + 1e-8) + self.weight_decay * leaf
                leaf.add_(-lr * update)
        return loss.detach()


def test_without_switches_a_run_is_plain_lora_bit_for_bit(monkeypatch):
    monkeypatch.setattr(_linear, "cheapest_path", lambda **_: "factored")  # the products of plain LoRA
    # Without clipping, whose norm adds up the stack in another order.
    run = make_run(never(), dtype=torch.float32, start="lora", weight_decay=0.1, max_norm=math.inf)
    plain = PlainLoRA(run.state, weight_decay=0.1)
    for (state, aux), batch in zip(run_for(run, 40, dtype=torch.float32), batches(40, torch.float32), strict=True):
        assert_same(aux["loss"], plain.step(*batch))
        got = flat(state)
        for name, leaf in plain.leaves.items():
            assert_same(got[name], leaf.mT if name.endswith(".b") else leaf)


def test_two_runs_are_bitwise_equal():
    first, second = (run_for(make_run(SWITCHING), 20) for _ in range(2))
    assert_same(first, second)
