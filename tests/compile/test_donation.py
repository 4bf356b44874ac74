"""A donated state is written in place, and its use after a step is caught."""

from collections.abc import Callable

import pytest
import torch
from torch.utils._pytree import tree_map

from dynlora_fn import compile_step
from dynlora_fn.testing import assert_same, normal


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


def test_state_that_cannot_be_donated_is_refused():
    step = compile_step(lambda state: (tree_map(lambda leaf: leaf + 1, state), None), backend="aot_eager")
    tensor = torch.zeros(4)
    with pytest.raises(ValueError, match=r"`state` tensors at \['x'\] and \['y'\] share memory"):
        step({"x": tensor, "y": tensor[2:]})
    with pytest.raises(ValueError, match=r"`state` tensor at \['x'\] has requires_grad=True"):
        step({"x": torch.zeros(2, requires_grad=True)})
    with pytest.raises(ValueError, match=r"`state` at \['n'\] is of type int, which cannot be donated"):
        step({"x": tensor, "n": 3})


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
        with pytest.raises(RuntimeError, match=r"state tensor at \['x'\] was written over by a step"):
            use(old["x"])
    with pytest.raises(ValueError, match=r"`state` tensor at \['x'\] was written over by an earlier step"):
        step(old)
    for count in range(2, 5):
        with torch.compiler.set_stance("fail_on_recompile"):
            new, _ = step(new)
        assert_same(new, {"x": torch.full((2,), float(count))})
        assert new["x"].data_ptr() == memory


def test_aux_that_would_be_written_over_is_caught():
    step = compile_step(lambda state: ({"x": state["x"] + 1}, state["x"][0]), debug=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"`aux` shares memory with the donated state at \['x'\]"):
        step({"x": torch.zeros(2)})
