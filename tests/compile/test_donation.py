"""A donated state is written in place, and its use after a step is caught."""

import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map

from dynlora_fn import compile_step
from dynlora_fn.compile._donation import _check_disjoint
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


@pytest.mark.parametrize("use", [lambda x: torch.stack([x, x]), lambda x: torch.cat(tensors=(x, x))])
def test_a_consumed_tensor_in_a_list_is_refused_by_name(use):
    state = {"x": torch.zeros(2)}
    counting()(state)
    with pytest.raises(
        RuntimeError, match=r"state tensor at \['x'\] was written over by a step, and `(stack|cat)` uses"
    ):
        use(state["x"])


def test_what_a_step_reports_with_debug_keeps_its_values():
    step = compile_step(lambda state: ({"x": state["x"] + 1}, state["x"][0]), debug=True, backend="aot_eager")
    state, first = step({"x": torch.zeros(2)})
    state, second = step(state)
    assert_same([first, second, state["x"]], [torch.tensor(0.0), torch.tensor(1.0), torch.full((2,), 2.0)])


def shared_by_numpy() -> tuple[torch.Tensor, torch.Tensor]:
    """Two storages that overlap without being one."""
    array = np.zeros(6, dtype=np.float32)
    return torch.from_numpy(array[:4]), torch.from_numpy(array[2:])


def with_other_data() -> tuple[torch.Tensor, torch.Tensor]:
    first, second = torch.zeros(4), torch.zeros(4)
    second.data = first
    return first, second


SHARED = {
    "one tensor": lambda: (torch.zeros(4),) * 2,
    "views": lambda: torch.zeros(8).view(2, 4).unbind(),
    "detached": lambda: (tensor := torch.zeros(4), tensor.detach()),
    "numpy": shared_by_numpy,
    "data": with_other_data,
}


@pytest.mark.parametrize("make", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("calls", [0, 1, 3])
def test_memory_that_is_stored_twice_is_found_at_any_call(make, calls):
    step = compile_step(lambda state: (tree_map(lambda leaf: leaf + 1, state), None), backend="aot_eager")
    state = {"x": torch.zeros(4), "y": torch.zeros(4)}
    for _ in range(calls):
        state, _ = step(state)
    x, y = make()
    with pytest.raises(ValueError, match=r"`state` tensors at \['[xy]'\] and \['[xy]'\] share memory"):
        step({"x": x, "y": y})
    assert not x.any()
    assert not y.any()
    step(state)  # one that was checked before goes on


def test_a_state_that_changes_in_place_between_calls_is_checked_again():
    step = compile_step(lambda state: (tree_map(lambda leaf: leaf + 1, state), None), backend="aot_eager")
    state, _ = step({"x": torch.zeros(2), "y": torch.zeros(2)})
    state["y"].data = state["x"]
    with pytest.raises(ValueError, match="share memory"):
        step(state)
    state["y"].data = torch.zeros(2)
    state["x"].requires_grad_()
    with pytest.raises(ValueError, match=r"`state` tensor at \['x'\] has requires_grad=True"):
        step(state)
    state["x"].requires_grad_(False)
    state["y"] = state["x"]
    with pytest.raises(ValueError, match="share memory"):
        step(state)


def test_an_expanded_tensor_is_refused():
    step = compile_step(lambda state: ({"x": state["x"] * 2}, None), backend="aot_eager")
    with pytest.raises(ValueError, match=r"`state` tensor at \['x'\] is expanded: several of its elements are stored"):
        step({"x": torch.zeros(3, 1).expand(3, 4)})
    step({"x": torch.zeros(1, 1).expand(1, 1)})
    step({"x": torch.zeros(0, 1).expand(0, 4)})


def test_a_tensor_inside_the_memory_of_another_is_found():
    """Tensors inside one subclass may overlap."""
    with pytest.raises(ValueError, match="`state` tensors at x and y share memory"):
        _check_disjoint([(0, 10, "x"), (2, 4, "x"), (5, 8, "y")])
    _check_disjoint([(0, 10, "x"), (2, 4, "x"), (10, 12, "y")])


def test_an_argument_that_is_a_view_of_the_state_is_refused():
    def step(state, batch, *, weights):
        return {"x": state["x"] + batch["inputs"].sum(), "y": state["y"] * weights[0]}, None

    compiled = compile_step(step, backend="aot_eager")
    state, _ = compiled({"x": torch.ones(2), "y": torch.ones(2)}, {"inputs": torch.ones(2)}, weights=[torch.ones(2)])
    for inputs, weights, name in (
        (state["y"][:1], torch.ones(2), r"batch\['inputs'\]"),
        (torch.ones(2), state["x"].detach(), r"weights\[0\]"),
    ):
        with pytest.raises(ValueError, match=rf"`{name}` shares memory with the donated `state` tensor at \['[xy]'\]"):
            compiled(state, {"inputs": inputs}, weights=[weights])
    state, _ = compiled(state, {"inputs": state["x"]}, weights=[state["y"]])  # the tensors themselves
    assert_same(state, {"x": torch.full((2,), 9.0), "y": torch.ones(2)})


def test_the_tensors_of_a_dropped_state_are_freed():
    step, dropped = compile_step(lambda state: (state + 1, None), backend="aot_eager"), torch.zeros(2)
    step(dropped)
    alive = weakref.ref(dropped)
    del dropped
    assert alive() is None


def test_a_state_made_in_inference_mode_is_refused_outside_of_it():
    with torch.inference_mode():
        state = {"w": torch.zeros(2)}
    step = compile_step(lambda state: ({"w": state["w"] + 1}, None), backend="eager")
    with pytest.raises(ValueError, match=r"`state` tensor at \['w'\] was made in inference mode"):
        step(state)
    with torch.inference_mode():
        assert step(state).state["w"].tolist() == [1, 1]
