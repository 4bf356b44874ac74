"""An adapter that is trained on takes PEFT's steps at the same rate, and goes back as it came."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import dynlora_fn as dl
from dynlora_fn.interop import load_adapter, save_adapter
from dynlora_fn.optim import adamw, clip_by_global_norm, sgd
from dynlora_fn.testing import assert_same, normal

peft = pytest.importorskip("peft")
STEPS, PRECISION = 50, 1e-5
X, TARGET = normal(0, 32, 24, dtype=torch.float32), normal(1, 32, 20, dtype=torch.float32)

SETTINGS = {
    "alpha of the rank": {"r": 16, "lora_alpha": 16},
    "four times the rank": {"r": 8, "lora_alpha": 32},
    "rslora": {"r": 6, "lora_alpha": 5, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 3, "rank_pattern": {"2": 3}, "alpha_pattern": {"2": 7}},
    "subtracted": {"r": 4, "lora_alpha": -8},
}


class Case(NamedTuple):
    """An optimizer of torch, and the same one here."""

    theirs: Callable[[list[Tensor]], torch.optim.Optimizer]
    ours: Any
    lr: float
    max_norm: float | None = None


OPTIMIZERS = {
    "adamw": Case(
        lambda factors: torch.optim.AdamW(factors, lr=2e-3, weight_decay=0.1), adamw(factor_decay=0.1), lr=2e-3
    ),
    "sgd": Case(lambda factors: torch.optim.SGD(factors, lr=5e-3, momentum=0.9), sgd(momentum=0.9), lr=5e-3),
    "clipped": Case(lambda factors: torch.optim.AdamW(factors, lr=2e-3, weight_decay=0), adamw(), 2e-3, max_norm=0.05),
}


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 18), nn.Tanh(), nn.Linear(18, 20))


def adapted(settings: dict[str, Any], folder: Any) -> nn.Module:
    config = peft.LoraConfig(target_modules=["0", "2"], init_lora_weights=False, **settings)
    torch.manual_seed(1)
    theirs = peft.get_peft_model(make(), config)
    theirs.save_pretrained(folder)
    return theirs


def loss_of(output: Tensor) -> Tensor:
    return (output - TARGET).square().mean()


def by_peft(theirs: nn.Module, case: Case) -> list[float]:
    factors = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizer, losses = case.theirs(factors), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(theirs(X))
        loss.backward()
        if case.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(factors, case.max_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


def here(params: dict[str, Any], case: Case) -> tuple[dict[str, Any], list[float]]:
    trainable, frozen = dl.partition(params, frozen=["*.bias"])
    state, model, losses = case.ours.init(trainable), make(), []

    def loss_fn(trainable: Any) -> Tensor:
        return loss_of(dl.call(model, dl.combine(trainable, frozen), X))

    for _ in range(STEPS):
        loss, grads = dl.value_and_grad(loss_fn)(trainable)
        if case.max_norm is not None:
            grads, _ = clip_by_global_norm(grads, case.max_norm)
        updates, state = case.ours.update(grads, state, trainable, lr=case.lr)
        trainable = dl.apply_updates(trainable, updates)
        losses.append(loss.item())
    return dl.combine(trainable, frozen), losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_fifty_steps_are_those_of_peft(settings, optimizer, tmp_path):
    theirs, case = adapted(SETTINGS[settings], tmp_path), OPTIMIZERS[optimizer]
    params, losses = here(load_adapter(make(), tmp_path, seed=0), case)
    wanted = by_peft(theirs, case)
    assert wanted[-1] < 0.99 * wanted[0]
    torch.testing.assert_close(losses, wanted, rtol=PRECISION, atol=PRECISION)
    for name in ("0", "2"):
        layer = theirs.base_model.model[int(name)]
        factors = params[f"{name}.weight"].factors
        torch.testing.assert_close(factors.b, layer.lora_B["default"].weight.data, rtol=0, atol=PRECISION)
        torch.testing.assert_close(factors.a, layer.lora_A["default"].weight.data, rtol=0, atol=PRECISION)
        weight = layer.base_layer.weight.data + layer.get_delta_weight("default").data
        torch.testing.assert_close(dl.materialize(params[f"{name}.weight"]), weight, rtol=0, atol=PRECISION)


def test_init_with_the_alpha_of_peft_trains_as_peft(tmp_path):
    """From the same vectors, and by an optimizer that is written by hand."""
    params = dl.init(make(), rank=4, alpha=8, seed=0, targets=["*.weight"], start="lora")
    save_adapter(make(), params, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path, is_trainable=True)
    case = OPTIMIZERS["sgd"]
    trainable, frozen = dl.partition(params, frozen=["*.bias"])
    model, losses = make(), []
    momenta = {
        name: leaf._replace(b=torch.zeros_like(leaf.b), a=torch.zeros_like(leaf.a)) for name, leaf in trainable.items()
    }
    for _ in range(STEPS):
        loss, grads = dl.value_and_grad(lambda tree: loss_of(dl.call(model, dl.combine(tree, frozen), X)))(trainable)
        for name, grad in grads.items():
            b, a = 0.9 * momenta[name].b + grad.b, 0.9 * momenta[name].a + grad.a
            momenta[name] = grad._replace(b=b, a=a)
            leaf = trainable[name]
            trainable[name] = leaf._replace(b=leaf.b - case.lr * b, a=leaf.a - case.lr * a)
        losses.append(loss.item())
    torch.testing.assert_close(losses, by_peft(theirs, case), rtol=PRECISION, atol=PRECISION)


@pytest.mark.parametrize("settings", SETTINGS)
def test_factors_and_alpha_go_back_as_they_came(settings, tmp_path):
    adapted(SETTINGS[settings], tmp_path / "theirs")
    params = load_adapter(make(), tmp_path / "theirs", seed=0)
    save_adapter(make(), params, tmp_path / "ours")
    before, after = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert_same(after, {key: before[key] for key in after})
    assert before.keys() == after.keys()
    again = load_adapter(make(), tmp_path / "ours", seed=0)
    assert_same(again, params)
    with torch.no_grad():
        read = [peft.PeftModel.from_pretrained(make(), tmp_path / side)(X) for side in ("theirs", "ours")]
    torch.testing.assert_close(*read)


def test_alphas_are_those_of_the_file(tmp_path):
    adapted(SETTINGS["patterns"], tmp_path / "theirs")
    params = load_adapter(make(), tmp_path / "theirs", seed=0)
    assert {name: param.alpha for name, param in params.items() if isinstance(param, dl.LowRank)} == {
        "0.weight": 3.0,
        "2.weight": 7.0,
    }
    save_adapter(make(), params, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["alpha_pattern"]) == (4, 3, {"2": 7})


def test_layers_of_other_alphas_share_no_stack(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(3)))
    config = peft.LoraConfig(r=2, lora_alpha=2, alpha_pattern={"2": 5}, target_modules=["0", "1", "2"])
    peft.get_peft_model(nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(3))), config).save_pretrained(
        tmp_path
    )
    params = load_adapter(model, tmp_path, seed=0)
    assert sorted(param.alpha for param in dl.unstack(params).values()) == [2.0, 2.0, 5.0]
    assert any(param.seed.ndim for param in params.values())


@pytest.mark.parametrize("settings", [{"lora_alpha": 4, "alpha_pattern": {"2": 0}}, {"lora_alpha": 0}])
def test_an_alpha_of_zero_is_refused(settings, tmp_path):
    adapted({"r": 2, **settings}, tmp_path)
    with pytest.raises(ValueError, match=r"factors whose `alpha` is 0 for '\d.weight', with which they change nothing"):
        load_adapter(make(), tmp_path, seed=0)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))


@pytest.mark.parametrize(("rank", "alpha"), [(3, 1.0), (2, 0.7), (4, 16.0)])
def test_tied_weights_with_any_scale_load(rank, alpha, tmp_path):
    torch.manual_seed(0)
    model = Tied()
    params = dl.init(model, rank=rank, alpha=alpha, seed=0, targets=["embedding.weight"])
    save_adapter(model, params, tmp_path)
    base = Tied()
    base.embedding.weight.data = params["embedding.weight"].base.clone()
    again = load_adapter(base, tmp_path, seed=0)
    assert_same(again["embedding.weight"].factors, params["embedding.weight"].factors)
