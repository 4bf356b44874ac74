"""A compiled step equals the eager one, in one graph."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._pytree import tree_leaves

from dynlora_fn import combine, compile_step
from dynlora_fn.testing import assert_same, untouched
from tests.support.training import SWITCHING, batches, make_run, run_for


@pytest.mark.slow
@pytest.mark.parametrize("donate", [True, False])
def test_compiled_equals_eager_in_one_graph(donate):
    """Nothing recompiles over steps, learning rates, plans and numbers of switches.

    A donated state keeps its memory, and a state that is not donated does not change.
    """
    wanted, run = run_for(make_run(SWITCHING), 50), make_run(SWITCHING)
    compiled = compile_step(run.step, donate=donate, backend="aot_eager")
    state, leaves = run.state, tree_leaves(run.state)
    memory = [leaf.data_ptr() for leaf in leaves]
    for index, batch in enumerate(batches(50)):
        with (
            torch.compiler.set_stance("fail_on_recompile" if index else "default"),
            nullcontext() if donate else untouched(state),
        ):
            state, aux = compiled(state, *batch)
        assert_same((state, aux), wanted[index])  # the same kernels in the same order
        if donate:
            assert all(new is old for new, old in zip(tree_leaves(state), leaves, strict=True))
            assert [leaf.data_ptr() for leaf in leaves] == memory
    numbers = {SWITCHING.switches(step, combine(state.trainable, state.frozen)) for step in range(50)}
    assert len(numbers) > 1  # some steps switch, and some do not


@pytest.mark.slow
def test_a_process_may_compile_any_number_of_steps():
    def make(increment):
        return lambda state: ({"x": state["x"] + increment}, None)

    for donate in (True, False):
        for increment in range(torch._dynamo.config.recompile_limit + 2):
            state, _ = compile_step(make(increment), donate=donate, backend="aot_eager")({"x": torch.zeros(2)})
            assert_same(state, {"x": torch.full((2,), float(increment))})


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda state: ({"x": state["x"][:1]}, None), r"`step` changes a state tensor from \(2,\) .* to \(1,\)"),
        (lambda state: ({"x": state["x"].double()}, None), r"`step` changes a state tensor .* to \(2,\) torch.float64"),
        (lambda state: ({"x": state["x"], "y": state["x"] + 1}, None), "`step` changes the structure of its state"),
    ],
)
def test_a_step_that_changes_the_kind_of_its_state_is_refused(step, message):
    with pytest.raises(ValueError, match=message):
        compile_step(step, backend="aot_eager")({"x": torch.zeros(2)})


@pytest.mark.parametrize("donate", [True, False])
@pytest.mark.parametrize(
    ("step", "kind"),
    [
        (lambda state: {"x": state["x"], "y": state["y"] + 1}, "dict"),
        (lambda state: (state, state["x"], state["y"]), "tuple"),
        (lambda state: torch.stack([state["x"], state["y"]]), "Tensor"),
        (lambda state: None, "NoneType"),
    ],
)
def test_a_step_that_returns_no_pair_is_refused(step, kind, donate):
    state = {"x": torch.zeros(2), "y": torch.zeros(2)}
    with pytest.raises(ValueError, match=rf"`step` returned a {kind}, but must return a pair; return `\(state, aux\)`"):
        compile_step(step, donate=donate, backend="aot_eager")(state)


@pytest.mark.slow
@pytest.mark.inductor
def test_a_step_that_switches_equals_eager_with_inductor():
    run, wanted = make_run(SWITCHING), run_for(make_run(SWITCHING), 12)
    compiled, state = compile_step(run.step), run.state
    for index, batch in enumerate(batches(12)):
        with torch.compiler.set_stance("fail_on_recompile" if index else "default"):
            state, aux = compiled(state, *batch)
        torch.testing.assert_close((state, aux), wanted[index], rtol=0, atol=1e-10)  # as for the reference


@pytest.mark.inductor
def test_inductor_reads_what_a_step_has_written_in_place():
    """`torch.compile` raises a KeyError for this step on CPUs (pytorch#196570)."""

    def step(state, x):
        new = x.clone()
        new[torch.arange(8).unsqueeze(0), torch.arange(8).unsqueeze(1)] = 0
        return state + torch.softmax(x + new, dim=-1), None

    x, state = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)), torch.ones(8, 8)
    torch.testing.assert_close(compile_step(step, donate=False)(state, x).state, 1 + torch.softmax(x, dim=-1))
