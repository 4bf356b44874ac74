"""What a donated step reports keeps its values when the state is written over."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

import dynlora_fn as dl
from dynlora_fn import compile_step
from dynlora_fn.compile._step import _copy
from dynlora_fn.testing import assert_same, normal

# By name: what a step reports from its old state, its new state and its batch.
REPORTS: dict[str, Any] = {
    "tensor": lambda old, new, batch: old["x"],
    "detached": lambda old, new, batch: old["x"].detach(),
    "row": lambda old, new, batch: old["x"][0],
    "element": lambda old, new, batch: old["x"][0, 1],
    "transposed": lambda old, new, batch: old["x"].T,
    "view of a view": lambda old, new, batch: old["x"].T.reshape(9)[3:].view(2, 3)[1],
    "unbound": lambda old, new, batch: old["x"].unbind(),
    "split": lambda old, new, batch: list(old["x"].split(2, dim=1)),
    "expanded": lambda old, new, batch: old["x"][:, None].expand(3, 2, 3),
    "bits": lambda old, new, batch: old["x"].view(torch.int64),
    "contiguous": lambda old, new, batch: old["x"].contiguous(),
    "same dtype": lambda old, new, batch: old["x"].to(torch.float64),
    "alias": lambda old, new, batch: torch.ops.aten.alias(old["x"]),
    "of a gradient": lambda old, new, batch: torch.func.grad(lambda x: (x**2).sum())(old["x"])[0],
    "inside a gradient": lambda old, new, batch: torch.func.grad(
        lambda x: ((x**2).sum(), {"row": x[1], "loss": (x**2).sum()}), has_aux=True
    )(old["x"]),
    "inside vmap": lambda old, new, batch: torch.vmap(lambda x: x[1:])(old["x"]),
    "new": lambda old, new, batch: new["x"],
    "new row": lambda old, new, batch: new["x"][0],
    "new that is old": lambda old, new, batch: (new["y"], new["y"].T),
    "batch": lambda old, new, batch: batch[0],
    "beside other values": lambda old, new, batch: {"none": None, "n": 3, "row": old["x"][2], "name": "x", "ok": True},
}


def step_with(report: Any, dense: bool = False) -> Any:
    def step(state: Any, batch: torch.Tensor) -> Any:
        new = {"x": state["x"] + batch.sum(), "y": state["y"], "z": state["x"] * 2}
        return new, report(state, new, batch)

    return step


def state() -> dict[str, torch.Tensor]:
    return {"x": normal(0, 3, 3), "y": normal(1, 3, 3), "z": normal(2, 3, 3)}


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_a_report_keeps_its_values(report):
    step, batch = step_with(report), normal(3, 2, 3)
    wanted = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, step(state(), batch))
    compiled = compile_step(step, backend="aot_eager")
    first = compiled(state(), batch)
    assert_same(tuple(first), wanted)
    compiled(first.state, batch)  # writes over the state again
    assert_same(first.aux, wanted[1])


def test_a_report_keeps_its_values_without_the_compiler():
    step, batch = step_with(REPORTS["row"]), normal(3, 2, 3)
    wanted = step(state(), batch)[1].clone()
    assert_same(compile_step(step, disable=True)(state(), batch).aux, wanted)


def test_a_report_of_factors_keeps_its_values():
    """Factors inside `value_and_grad`, as a training step reports them."""
    model = nn.Linear(4, 4)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(normal(index, *parameter.shape))

    def step(state: Any, batch: torch.Tensor) -> Any:
        trainable, frozen = state

        def loss_fn(trainable: Any) -> Any:
            loss = dl.call(model, dl.combine(trainable, frozen), batch).square().mean()
            return loss, {"first vector": trainable["weight"].a[0], "bias": trainable["bias"].detach()}

        (loss, metrics), grads = dl.value_and_grad(loss_fn, has_aux=True)(trainable)
        new = tree_map(lambda leaf, grad: leaf - 0.1 * grad, trainable, grads)
        return (new, frozen), {**metrics, "loss": loss, "base": frozen["weight"].base[0]}

    def start() -> Any:
        return tuple(dl.partition(tree_map(torch.clone, dl.init(model, rank=2, seed=0, targets=["weight"]))))

    batch = normal(5, 3, 4, dtype=torch.float32)
    wanted = tree_map(torch.clone, step(start(), batch)[1])
    assert_same(compile_step(step, backend="aot_eager")(start(), batch).aux, wanted)


def test_tensors_that_are_new_are_not_copied():
    """The graph of a step whose report shares no memory with the state has no copy but those into the state."""
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compile_step(step_with(lambda old, new, batch: (old["x"] ** 2).sum()), backend=record)(state(), normal(3, 2, 3))
    called = [node for node in graphs[0].graph.nodes if node.op in ("call_function", "call_method")]
    (writes,) = [node for node in called if node.target is _copy]
    assert [len(leaves) for leaves in writes.args] == [2, 2]  # "x" and "z"
    others = [node.target for node in called if node is not writes]
    assert not {"clone", "copy_"} & {target for target in others if isinstance(target, str)}
    assert all(isinstance(target, str) or "dynlora" not in target.__module__ for target in others)


class Report:
    def __init__(self, weight: torch.Tensor):
        self.weight = weight


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (lambda old, new, batch: {"w": Report(old["x"])}, r"`aux\['w'\]` is of type Report; return tensors"),
        (lambda old, new, batch: [1, {old["x"]}], r"`aux\[1\]` is of type set; return tensors"),
    ],
    ids=["object", "set"],
)
def test_a_report_that_cannot_be_searched_is_refused(report, message):
    old = state()
    before = tree_map(torch.clone, old)
    with pytest.raises(ValueError, match=message):
        compile_step(step_with(report), backend="aot_eager")(old, normal(3, 2, 3))
    assert_same(old, before)


def test_a_report_of_a_tensor_inside_torchao_s_keeps_its_values():
    torchao = pytest.importorskip("torchao.quantization")
    granularity = pytest.importorskip("torchao.quantization.granularity")

    def quantized(x: torch.Tensor) -> torch.Tensor:
        return torchao.Int8Tensor.from_hp(x, granularity=granularity.PerRow())

    def step(state: Any) -> Any:
        return (quantized(state[0].dequantize() * 2),), (state[0].scale, state[0].qdata[0], state[0].dequantize())

    weight = quantized(normal(0, 8, 16, dtype=torch.float32))
    wanted = tree_map(torch.clone, step((weight,))[1])
    assert_same(compile_step(step, backend="aot_eager")((weight,)).aux, wanted)
