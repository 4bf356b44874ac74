"""Arguments of a compiled step: what lets it compile again, which sizes may change, and which options there are."""

import functools
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

import dynlora_fn as dl
from dynlora_fn import compile_step
from dynlora_fn.testing import assert_same, normal

LIMIT = 4  # torch's is 8
compile_eager = functools.partial(compile_step, backend="aot_eager")


@pytest.fixture(autouse=True)
def _low_limit():
    with torch._dynamo.config.patch(recompile_limit=LIMIT):
        yield


class Batch(NamedTuple):
    tokens: torch.Tensor
    weights: dict[str, Any]


def training(state, batch, rate=1.0, *, clip=None):
    total = sum(leaf.sum() for leaf in torch.utils._pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor))
    return {"w": state["w"] - rate * total * (1 if clip is None else clip)}, total


def call_often(step, arguments, count=LIMIT + 1):
    state = {"w": torch.zeros(2)}
    for index in range(count):
        args, kwargs = arguments(index)
        state, _ = step(state, *args, **kwargs)
    return state


# By name: the arguments of call `index`, and what the message says.
CHANGING = {
    "shape": (
        lambda index: ((torch.ones(index + 2),), {}),
        r"`batch` was float32\[2\] on cpu, float32\[3\] on cpu, float32\[4\] on cpu, \.\.\., float32\[6\] on cpu; "
        r"pad .*mark_dynamic.*dynamic=True",
    ),
    "nested shape": (
        lambda index: ((Batch(torch.ones(2), {"mask": [torch.ones(1), torch.ones(index + 2)]}),), {}),
        r": `batch\.weights\['mask'\]\[1\]` was .*; pad",
    ),
    "dtype": (
        lambda index: ((torch.ones(index // 4 + 2, dtype=DTYPES[index % 4]),), {}),
        r"`batch` was float32\[2\] on cpu, float64\[2\]",
    ),
    "number": (
        lambda index: ((torch.ones(2), 1 / 2**index), {}),
        r": `rate` was 1\.0, 0\.5, 0\.25, \.\.\., 0\.0625; pass a tensor in place of a Python value",
    ),
    "keyword": (
        lambda index: ((torch.ones(2),), {"clip": index + 1}),
        r": `clip` was 1, 2, 3, \.\.\., 5; pass a tensor",
    ),
    "two of three": (
        lambda index: ((torch.ones(index + 2),), {"rate": 0.5, "clip": float(index)}),
        r": `batch` was .*; `clip` was 0\.0, .*; pass a tensor .*, or pad",
    ),
    "key": (
        lambda index: (({"common": torch.ones(2), f"mask {index}": torch.ones(2)},), {}),
        r"`batch\['mask 0'\]` was float32\[2\] on cpu, absent; ",
    ),
}
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@pytest.mark.parametrize(("arguments", "message"), CHANGING.values(), ids=CHANGING)
def test_arguments_that_change_too_often_are_named(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        call_often(compile_eager(training), arguments)
    assert f"`step` was compiled {LIMIT} times" in str(caught.value)


def test_a_state_that_changes_its_shape_is_named():
    step = compile_eager(lambda state: ({"w": [state["w"][0] + 1]}, None))
    for size in range(1, LIMIT + 1):
        step({"w": [torch.zeros(size)]})
    with pytest.raises(ValueError, match=r": `state\['w'\]\[0\]` was float32\[1\] on cpu, "):
        step({"w": [torch.zeros(LIMIT + 1)]})


def test_another_cause_is_not_blamed_on_the_arguments():
    setting = {"scale": 0.0}
    step = compile_eager(lambda state: ({"w": state["w"] + setting["scale"]}, None))
    for index in range(LIMIT):
        setting["scale"] = float(index)
        step({"w": torch.zeros(2)})
    setting["scale"] = float(LIMIT)
    with pytest.raises(ValueError, match="and its arguments have not changed; find the cause with TORCH_LOGS"):
        step({"w": torch.zeros(2)})


def test_a_step_goes_on_after_a_refused_call():
    step = compile_eager(training)
    arguments = CHANGING["shape"][0]
    with pytest.raises(ValueError, match="was compiled"):
        call_often(step, arguments)
    assert_same(call_often(step, arguments, LIMIT), call_often(training, arguments, LIMIT))


def test_keywords_and_functions_without_a_signature_are_accepted():
    wanted, _ = training({"w": torch.zeros(2)}, torch.ones(3), rate=0.5, clip=2)
    got, _ = compile_eager(training)({"w": torch.zeros(2)}, rate=0.5, batch=torch.ones(3), clip=2)
    assert_same(got, wanted)
    got, _ = compile_eager(functools.partial(training, clip=2))({"w": torch.zeros(2)}, torch.ones(3), 0.5)
    assert_same(got, wanted)


def net() -> tuple[nn.Module, Any]:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(normal(index, *parameter.shape))
    params = tree_map(torch.clone, dl.init(model, rank=2, seed=0, targets=["*.weight"], base="int8"))
    optimizer, schedule = dl.optim.adamw(), dl.schedules.switchlora(40)

    def step(state: Any, batch: torch.Tensor, lr: Any) -> Any:
        trainable, frozen, opt_state, t = state

        def loss_fn(trainable: Any) -> torch.Tensor:
            return (dl.call(model, dl.combine(trainable, frozen), batch) - 1).square().mean()

        loss, grads = dl.value_and_grad(loss_fn)(trainable)
        params = dl.combine(trainable, frozen)
        plan = schedule(t, params)
        trainable, frozen = dl.partition(dl.switch(params, plan).params)
        opt_state = dl.project_optimizer_state(opt_state, plan)
        updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=lr)
        return (dl.apply_updates(trainable, updates), frozen, opt_state, t + 1), loss

    trainable, frozen = dl.partition(params)
    return step, (trainable, frozen, optimizer.init(trainable), torch.tensor(0))


@pytest.mark.slow
def test_sizes_and_numbers_may_change():
    """A step with a switch takes more lengths and rates than torch would compile."""
    step, state = net()
    compiled, (_, other) = compile_eager(step, dynamic=True), net()
    for index in range(LIMIT + 4):
        batch, lr = normal(index, 4 + index, 8, dtype=torch.float32), 0.1 / (1 + index)
        state, loss = compiled(state, batch, lr)
        other, wanted = step(other, batch, lr)
        torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(torch.utils._pytree.tree_leaves(state), torch.utils._pytree.tree_leaves(other))


@pytest.mark.slow
def test_an_axis_may_be_marked_dynamic():
    step, state = net()
    compiled, (_, other) = compile_eager(step), net()
    for index in range(4):
        batch = normal(index, 4 + index, 8, dtype=torch.float32)
        torch._dynamo.mark_dynamic(batch, 0)
        with torch.compiler.set_stance("fail_on_recompile" if index else "default"):
            state, loss = compiled(state, batch, torch.tensor(0.1))
        other, wanted = step(other, batch, torch.tensor(0.1))
        torch.testing.assert_close(loss, wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "aot_eager", "mode": None, "options": None},
        {"backend": "eager", "fullgraph": True},
        {"backend": lambda graph, inputs: graph},
        {"backend": "aot_eager", "dynamic": None},
        {"disable": True},
    ],
    ids=["none", "fullgraph", "function", "dynamic", "disabled"],
)
def test_options_of_torch_are_accepted(options):
    state = {"w": torch.zeros(2)}
    got, aux = compile_step(training, **options)(state, torch.ones(3))
    assert got is state
    assert_same((got, aux), ({"w": torch.full((2,), -3.0)}, torch.tensor(3.0)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fullgraph": False}, ValueError, "`fullgraph` is False, but a step must be compiled into one graph"),
        (
            {"donated": True},
            TypeError,
            r"`compile_step` got the options \['donated'\]; `torch.compile` takes backend, ",
        ),
        ({"model": training}, TypeError, r"`compile_step` got the options \['model'\]"),
        ({"mode": "fast"}, RuntimeError, "Unrecognized mode=fast"),
        ({"options": {"fast": True}}, RuntimeError, "Unexpected optimization option fast"),
    ],
)
def test_other_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        compile_step(training, **options)


@pytest.mark.parametrize(
    "options", [{}, {"mode": None, "options": None}, {"mode": "default"}, {"backend": None}, {"options": {}}]
)
def test_none_means_torch_s_default(monkeypatch, options):
    """Inductor gets the same options, which contain the graph passes, and is not run."""
    passed: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", recording(passed))
    compile_step(training)
    compile_step(training, **options)
    assert passed[0]["options"].keys() == passed[1]["options"].keys() >= {"post_grad_custom_pre_pass"}


def test_options_have_precedence_over_a_mode(monkeypatch):
    passed: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", recording(passed))
    compile_step(training, mode="max-autotune", options={"max_autotune": False})
    assert passed[0]["options"]["max_autotune"] is False
    assert passed[0]["options"]["coordinate_descent_tuning"]
    assert "mode" not in passed[0]


def recording(passed: list[dict[str, Any]]) -> Any:
    @functools.wraps(torch.compile)
    def compile(function: Any, **options: Any) -> Any:
        passed.append(options)
        return function

    return compile
