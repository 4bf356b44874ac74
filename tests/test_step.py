"""Gradients, the compiled step, and the whole step against a slow reference and against plain LoRA."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from dynlora_fn import (
    apply_updates,
    call,
    combine,
    compile_step,
    init,
    partition,
    project_optimizer_state,
    switch,
    value_and_grad,
)
from dynlora_fn.optim import adamw, clip_by_global_norm
from dynlora_fn.schedules import Schedule
from dynlora_fn.testing import assert_same, eps, normal, untouched

EPS = eps(torch.float64)
MAX_NORM = 0.5
RANK = 2


class Net(nn.Module):
    """Two equal layers, which become a stack, and one of another shape."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x)


class TrainState(NamedTuple):
    trainable: Any
    frozen: Any
    opt_state: Any
    step: Tensor  # 0-d int64


class Run(NamedTuple):
    state: TrainState
    step: Callable


def make_run(
    schedule: Callable,
    *,
    dtype: torch.dtype = torch.float64,
    start: str = "switchlora",
    weight_decay: float = 0.0,
    max_norm: float = MAX_NORM,
) -> Run:
    torch.manual_seed(0)
    net, optimizer = Net().to(dtype), adamw(weight_decay=weight_decay)
    params = init(net, rank=RANK, seed=0, targets=["*.weight"], dtype=dtype, start=start)

    def step(state: TrainState, x: Tensor, y: Tensor, lr: Tensor) -> tuple[TrainState, dict[str, Tensor]]:
        def loss_fn(trainable: Any) -> Tensor:
            return (call(net, combine(trainable, state.frozen), x) - y).square().mean()

        loss, grads = value_and_grad(loss_fn)(state.trainable)
        grads, norm = clip_by_global_norm(grads, max_norm)
        params = combine(state.trainable, state.frozen)
        plan = schedule(state.step, params)
        params, _ = switch(params, plan)
        opt_state = project_optimizer_state(state.opt_state, plan)
        trainable, frozen = partition(params)
        updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=lr)
        return TrainState(apply_updates(trainable, updates), frozen, opt_state, state.step + 1), {
            "loss": loss,
            "norm": norm,
        }

    trainable, frozen = partition(params)
    return Run(TrainState(trainable, frozen, optimizer.init(trainable), torch.tensor(0)), step)


def batches(steps: int, dtype: torch.dtype = torch.float64) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Data, and a learning rate that warms up and falls."""
    for step in range(steps):
        x, y = normal(2 * step, 8, 6, dtype=dtype), normal(2 * step + 1, 8, 4, dtype=dtype)
        yield x, y, torch.tensor(0.02 * min(1, (step + 1) / 10) * 0.98**step, dtype=dtype)


# Rank 2 and interval 10: a side switches a vector every five steps at first, and then more rarely.
SWITCHING = Schedule(interval=10, decay=0.99, freeze=3)


# --- value_and_grad


def some_loss(tree: dict[str, Any], x: Tensor, *, scale: float = 1.0) -> Tensor:
    return scale * (x @ tree["w"][0]).tanh().mul(tree["b"]).sum()


def some_tree() -> dict[str, Any]:
    return {"w": (normal(0, 3, 4),), "b": normal(1, 4), "unused": normal(2, 2)}


@pytest.mark.parametrize("via", ["func", "autograd"])
def test_both_routes_equal_autograd(via):
    tree, x = some_tree(), normal(3, 5, 3)
    value, grads = value_and_grad(some_loss, via=via)(tree, x, scale=3.0)
    leaves = [leaf.clone().requires_grad_() for leaf in tree_leaves(tree)]
    loss = some_loss({"w": (leaves[0],), "b": leaves[1]}, x, scale=3.0)
    wanted = [*torch.autograd.grad(loss, leaves[:2]), torch.zeros(2, dtype=torch.float64)]
    # The same kernels in the same order.
    assert_same(value, loss.detach())
    assert_same(grads, {"w": (wanted[0],), "b": wanted[1], "unused": wanted[2]})
    assert not value.requires_grad
    assert not any(leaf.requires_grad for leaf in tree_leaves((grads, tree)))


@pytest.mark.parametrize("via", ["func", "autograd"])
def test_a_loss_may_report_more(via):
    def loss_fn(tree, x):
        loss = some_loss(tree, x)
        return loss, {"twice": 2 * loss}

    tree, x = some_tree(), normal(3, 5, 3)
    (loss, aux), grads = value_and_grad(loss_fn, via=via, has_aux=True)(tree, x)
    plain = value_and_grad(some_loss)(tree, x)
    assert_same((loss, grads), tuple(plain))
    assert_same(aux["twice"], 2 * loss)
    assert not aux["twice"].requires_grad


def test_gradients_do_not_depend_on_the_mode_of_the_caller():
    tree, x = some_tree(), normal(3, 5, 3)
    with torch.no_grad():
        got = [value_and_grad(some_loss, via=via)(tree, x) for via in ("func", "autograd")]
    assert_same(got, [value_and_grad(some_loss)(tree, x)] * 2)


def test_checkpoints_recompute_through_autograd():
    calls = []

    def layer(w, x):
        calls.append(1)
        return (x @ w).tanh()

    def loss_fn(tree, x, is_checkpointed):
        w = tree["w"][0]
        hidden = checkpoint(layer, w, x, use_reentrant=False) if is_checkpointed else layer(w, x)
        return hidden.mul(tree["b"]).sum()

    tree, x = some_tree(), normal(3, 5, 3)
    kept, recomputed = (value_and_grad(loss_fn, via="autograd")(tree, x, flag) for flag in (False, True))
    assert_same(recomputed, kept)
    assert len(calls) == 1 + 2


def test_per_sample_gradients_are_the_loop():
    tree, x = some_tree(), normal(3, 5, 3)
    got = torch.vmap(value_and_grad(some_loss), in_dims=(None, 0))(tree, x)
    alone = [value_and_grad(some_loss)(tree, row) for row in x]
    # Sums of 3 and 4 products of magnitude about 1, in another order.
    torch.testing.assert_close(got, tree_map(lambda *leaves: torch.stack(leaves), *alone), rtol=0, atol=32 * EPS)


def test_an_unknown_route_is_refused():
    with pytest.raises(ValueError, match="`via` is 'jax'; use 'func' or 'autograd'"):
        value_and_grad(some_loss, via="jax")


# --- compile_step


def run_for(run: Run, steps: int, step: Callable | None = None, dtype: torch.dtype = torch.float64) -> list[Any]:
    """Copies of the state and what was reported, after each step."""
    state, history = run.state, []
    for batch in batches(steps, dtype):
        state, aux = (step or run.step)(state, *batch)
        history.append(tree_map(torch.clone, (state, aux)))
    return history


@pytest.mark.parametrize("donate", [True, False])
def test_compiled_equals_eager_in_one_graph(donate):
    """No recompile over steps, learning rates, plans and numbers of switches; a donated state keeps its memory, and
    any other is left alone."""
    wanted, run = run_for(make_run(SWITCHING), 50), make_run(SWITCHING)
    compiled = compile_step(run.step, donate=donate, backend="aot_eager")
    state, leaves = run.state, tree_leaves(run.state)
    memory = [leaf.data_ptr() for leaf in leaves]
    for number, batch in enumerate(batches(50)):
        with (
            torch.compiler.set_stance("fail_on_recompile" if number else "default"),
            nullcontext() if donate else untouched(state),
        ):
            state, aux = compiled(state, *batch)
        assert_same((state, aux), wanted[number])  # the same kernels in the same order
        if donate:
            assert all(new is old for new, old in zip(tree_leaves(state), leaves, strict=True))
            assert [leaf.data_ptr() for leaf in leaves] == memory
    numbers = {SWITCHING.switches(step, combine(state.trainable, state.frozen)) for step in range(50)}
    assert len(numbers) > 1  # some steps switch, and some do not


@pytest.mark.parametrize(
    "step",
    [
        lambda state: ({"x": state["x"] + 1, "y": state["x"]}, None),  # keeps the last value
        lambda state: ({"x": state["y"], "y": state["x"]}, None),
        lambda state: ({"x": state["y"] * 2, "y": state["x"].T}, None),
        lambda state: ({"x": state["x"].T, "y": state["y"].flip(0)}, None),
        lambda state: ({"x": state["x"], "y": state["y"] + state["x"]}, None),
    ],
    ids=["last", "swap", "view", "transpose", "same"],
)
def test_old_leaves_may_come_back_under_other_names(step):
    state = {"x": normal(0, 3, 3), "y": normal(1, 3, 3)}
    wanted, _ = step(tree_map(torch.clone, state))
    wanted = tree_map(torch.clone, wanted)
    got, _ = compile_step(step, backend="aot_eager")(state)
    assert_same(got, wanted)


def test_a_process_may_compile_any_number_of_steps():
    def make(number):
        return lambda state: ({"x": state["x"] + number}, None)

    for donate in (True, False):
        for number in range(torch._dynamo.config.recompile_limit + 2):
            state, _ = compile_step(make(number), donate=donate, backend="aot_eager")({"x": torch.zeros(2)})
            assert_same(state, {"x": torch.full((2,), float(number))})


def test_state_that_cannot_be_donated_is_refused():
    step = compile_step(lambda state: (tree_map(lambda leaf: leaf + 1, state), None), backend="aot_eager")
    whole = torch.zeros(4)
    with pytest.raises(ValueError, match=r"`state` must hold no memory twice.*\['x'\] and \['y'\]"):
        step({"x": whole, "y": whole[2:]})
    with pytest.raises(ValueError, match=r"`state` must hold tensors that require no gradient.*at \['x'\]"):
        step({"x": torch.zeros(2, requires_grad=True)})
    with pytest.raises(ValueError, match=r"`state` must hold tensors .* got int at \['n'\]"):
        step({"x": whole, "n": 3})


def test_aux_may_hold_what_the_state_was():
    state = {"x": torch.zeros(2), "y": torch.ones(2)}
    step = compile_step(lambda state: ({"x": state["x"] + 1, "y": state["y"]}, [state["x"]]), backend="aot_eager")
    state, (first,) = step(state)
    state, (second,) = step(state)
    assert_same([first, second, state["x"]], [torch.zeros(2), torch.ones(2), torch.full((2,), 2.0)])


def counting(debug: bool = True) -> Callable:
    return compile_step(lambda state: ({"x": state["x"] + 1}, None), debug=debug, backend="aot_eager")


def test_a_consumed_state_is_caught():
    step, old = counting(), {"x": torch.zeros(2)}
    memory = old["x"].data_ptr()
    new, _ = step(old)
    for use in (torch.sum, torch.clone, lambda x: x + 1, lambda x: 1 - x, lambda x: x[0], lambda x: x.shape, print):
        with pytest.raises(RuntimeError, match=r"state's tensor at \['x'\] must not be used after a step"):
            use(old["x"])
    with pytest.raises(ValueError, match=r"`state` must be the one that the last step returned.*\['x'\]"):
        step(old)
    for number in range(2, 5):
        with torch.compiler.set_stance("fail_on_recompile"):
            new, _ = step(new)
        assert_same(new, {"x": torch.full((2,), float(number))})
        assert new["x"].data_ptr() == memory


def test_aux_that_would_be_written_over_is_caught():
    step = compile_step(lambda state: ({"x": state["x"] + 1}, state["x"][0]), debug=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"`aux` must hold no memory of a donated state.* that of \['x'\]"):
        step({"x": torch.zeros(2)})


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda state: ({"x": state["x"][:1]}, None), r"`step` must keep shapes and dtypes .* got \(1,\)"),
        (lambda state: ({"x": state["x"].double()}, None), r"`step` must keep shapes and dtypes .* torch\.float64"),
        (lambda state: ({"x": state["x"], "y": state["x"] + 1}, None), "`step` must keep the structure of its state"),
    ],
)
def test_a_step_that_changes_the_kind_of_its_state_is_refused(step, message):
    with pytest.raises(ValueError, match=message):
        compile_step(step, backend="aot_eager")({"x": torch.zeros(2)})


@pytest.mark.inductor
def test_a_step_that_switches_equals_eager_with_inductor():
    run, wanted = make_run(SWITCHING), run_for(make_run(SWITCHING), 12)
    compiled, state = compile_step(run.step), run.state
    for number, batch in enumerate(batches(12)):
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            state, aux = compiled(state, *batch)
        torch.testing.assert_close((state, aux), wanted[number], rtol=0, atol=1e-10)  # as to the reference
