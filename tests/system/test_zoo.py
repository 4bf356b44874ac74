"""Every cell of the README's table: unmodified models x weight kinds x what is done with them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dynlora_fn import (
    LowRank,
    apply_updates,
    call,
    checkpoint_contexts,
    combine,
    compile_step,
    partition,
    remat,
    state_dict,
    unstack,
    value_and_grad,
)
from dynlora_fn.optim import adamw
from dynlora_fn.testing import assert_same, eps, untouched
from tests.support.zoo import CASES, EAGER_ONLY, Case, model_and_params

pytest.importorskip("transformers")


def tolerance(case: Case) -> dict[str, float]:
    """Return the tolerance of a dozen layers of sums of up to 48 terms, with values of about 1."""
    return {"rtol": 0, "atol": 12 * 48 * eps(case.dtype)}


def loss_of(model: nn.Module, params: dict[str, Any], case: Case) -> Tensor:
    return case.loss(lambda *args, **kwargs: call(model, params, *args, **kwargs))


def projected(gradient: Tensor, param: LowRank) -> tuple[Tensor, Tensor]:
    """Project the gradient of a dense weight onto the factors: G a^T / r and b^T G / r."""
    b, a = param.factors
    *stack, rows, columns = (*b.shape[:-1], a.shape[-1])
    if len(stack) == gradient.ndim - 1:  # fused, above each other or side by side
        if gradient.shape[-1] == columns:
            gradient = gradient.reshape(*stack, rows, columns)
        else:
            gradient = gradient.reshape(*stack[:-1], rows, stack[-1], columns).transpose(-2, -3)
    gradient = gradient.reshape(*stack, rows, columns)
    return gradient @ a.mT / a.shape[-2], b.mT @ gradient / a.shape[-2]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward(case):
    model, params = model_and_params(case)
    with untouched(params, list(model.parameters())):
        got = loss_of(model, params, case)
    torch.testing.assert_close(got, case.loss(model).detach(), **tolerance(case))


@pytest.mark.parametrize("via", ["func", "autograd"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradient(case, via):
    model, params = model_and_params(case)
    trainable, frozen = partition(params)
    grads = value_and_grad(lambda tree: loss_of(model, combine(tree, frozen), case), via=via)(trainable).grads
    case.loss(model).backward()
    dense = {name: parameter.grad for name, parameter in model.named_parameters()}
    singles, found = unstack(params), unstack(combine(grads, frozen))
    assert singles.keys() == dense.keys()
    for name, param in singles.items():
        gradient = torch.zeros_like(model.get_parameter(name)) if dense[name] is None else dense[name]
        if isinstance(param, LowRank):
            b, a = projected(gradient, param)
            torch.testing.assert_close(found[name].factors.b, b, **tolerance(case))
            torch.testing.assert_close(found[name].factors.a, a, **tolerance(case))
        else:
            torch.testing.assert_close(found[name], gradient, **tolerance(case))


def training_step(model: nn.Module, case: Case, frozen: Any) -> Any:
    optimizer = adamw()

    def step(state, lr):
        trainable, opt_state = state
        loss, grads = value_and_grad(lambda tree: loss_of(model, combine(tree, frozen), case))(trainable)
        updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=lr)
        return (apply_updates(trainable, updates), opt_state), (loss, grads)

    return step


# Cases of one model that do not exclude each other are in one graph, since a graph takes half a minute to compile.
COMPILED = [
    ["Llama: linear, grouped heads", "Llama: tied embedding and head"],
    ["GPT-2: Conv1D", "GPT-2: embeddings, the head tied to one"],
    ["GPT-2: Conv1D, fused QKV as a stack"],
    ["Mixtral: experts, batched"],
    ["ViT: linear", "ViT: patch convolution"],
    ["TransformerEncoder: linear", "TransformerEncoder: fused QKV"],
    ["TransformerEncoder: fused QKV as a stack"],
    ["convolutions: 1d, 2d, 3d"],
]


def test_every_case_that_compiles_is_in_a_graph():
    assert sorted(name for names in COMPILED for name in names) == sorted(CASES.keys() - EAGER_ONLY)


def joined(names: list[str]) -> Case:
    """Return a case whose targets are those of several cases of one model."""
    cases = [CASES[name] for name in names]
    assert len({(case.make, case.loss, case.dtype) for case in cases}) == 1
    return cases[0]._replace(
        targets=[target for case in cases for target in case.targets],
        fused={pattern: shape for case in cases for pattern, shape in case.fused.items()},
    )


@pytest.mark.slow
@pytest.mark.parametrize("names", COMPILED, ids=" + ".join)
def test_compiled_step(names):
    case = joined(names)
    model, params = model_and_params(case)
    trainable, frozen = partition(params)
    step = training_step(model, case, frozen)
    state = trainable, adamw().init(trainable)
    wanted, first = step(state, torch.tensor(0.01))
    compiled = compile_step(step, backend="aot_eager")
    losses = []
    for index in range(6):
        state, (loss, grads) = compiled(state, torch.tensor(0.01))
        losses.append(loss)
        if not index:
            torch.testing.assert_close(state[0], wanted[0], rtol=0, atol=1e-7)
            torch.testing.assert_close((loss, grads), first, **tolerance(case))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_export(case):
    model, params = model_and_params(case)
    trainable, frozen = partition(params)
    state, _ = training_step(model, case, frozen)((trainable, adamw().init(trainable)), torch.tensor(0.01))
    params = combine(state[0], frozen)
    exported = state_dict(model, params)
    fresh = case.make().to(case.dtype)
    fresh.load_state_dict(exported)
    torch.testing.assert_close(case.loss(fresh).detach(), loss_of(model, params, case), **tolerance(case))
    for name, tied_name in case.tied:
        assert exported[name] is exported[tied_name]
        assert fresh.get_parameter(name) is fresh.get_parameter(tied_name)


def gradients(model: nn.Module, params: dict[str, Any], via: str) -> Any:
    trainable, frozen = partition(params)
    return value_and_grad(lambda tree: loss_of(model, combine(tree, frozen), LINEAR), via=via)(trainable)


LINEAR = CASES["Llama: linear, grouped heads"]


@pytest.mark.parametrize("via", ["func", "autograd"])
def test_remat_of_an_unmodified_model(via):
    model, params = model_and_params(LINEAR)
    assert_same(gradients(remat(model, ["model.layers.*"]), params, via), gradients(model, params, via))


def test_the_models_own_checkpointing():
    """The values differ from the model's, so a block that is recomputed with the model's would fail."""
    model, params = model_and_params(LINEAR)
    params = tree_map(lambda leaf: leaf * 1.5 if leaf.is_floating_point() else leaf, params)
    wanted = gradients(model, params, "autograd")
    contexts = checkpoint_contexts(model)
    model.train().gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
    parameters, calls = dict(model.named_parameters()), []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(None))
    assert_same(gradients(model, params, "autograd"), wanted)
    assert len(calls) == 2 * 2  # layers, each computed twice
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def test_attention_is_one_operation():
    """The tests above therefore cover `scaled_dot_product_attention` of low-rank projections."""
    models = [model_and_params(CASES[name])[0] for name in CASES if "Llama" in name or "ViT" in name]
    assert {model.config._attn_implementation for model in models} == {"sdpa"}
