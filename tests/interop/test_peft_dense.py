"""What an adapter has beside its factors: PEFT reads exactly what was trained, or it is refused by name."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dynlora_fn import LowRank, call, combine, explain, init, partition, state_dict, value_and_grad
from dynlora_fn.interop import FrozenTensor, load_adapter, open_weights, save_adapter, save_merged, save_weights
from dynlora_fn.testing import normal
from tests.support.zoo import LLAMA, TOKENS

peft = pytest.importorskip("peft")
X = normal(0, 5, 6, dtype=torch.float32)


class Patch(nn.Module):
    """A module with a parameter, and a child that has one too."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.position = nn.Linear(6, 6), nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x) + self.position


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(6)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scales[0] * self.scales[1]


class Block(nn.Module):
    """An adapted layer beside a parameter, for which PEFT has no place."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.scale = nn.Linear(6, 6), nn.Parameter(torch.ones(6))
        self.register_buffer("mean", torch.zeros(6))
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.q(x) * self.scale - self.mean)


def seeded(make: Any) -> Any:
    torch.manual_seed(0)
    return make().eval()


def numbered() -> nn.Module:
    """Return twelve layers, so that the name of one is the end of another's."""
    return nn.Sequential(*(nn.Linear(6, 6) if index != 10 else nn.Tanh() for index in range(12)))


def changed(model: nn.Module, params: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {
        name: param._replace(factors=param.factors._replace(b=param.factors.b + 0.2))
        if isinstance(param, LowRank)
        else param + 0.3
        if name in names
        else param
        for name, param in params.items()
    }


def assert_read_alike(model: nn.Module, params: dict[str, Any], folder: Path, x: Any = X) -> None:
    """Check the outputs of PEFT, and of the loaded parameters, on the model before training."""
    before = copy.deepcopy(model)
    with torch.no_grad():
        expected = call(model, params, x)
        theirs = peft.PeftModel.from_pretrained(before, folder).eval()(x)
        ours = call(model, load_adapter(model, folder, seed=0), x)
    for output in (theirs, ours):
        torch.testing.assert_close(getattr(output, "logits", output), getattr(expected, "logits", expected))


# By what changed: the model, what is adapted, what else changed, and the modules that PEFT copies.
SAVED = {
    "a module and its child": (
        lambda: nn.Sequential(Patch(), nn.Linear(6, 4)),
        ["1.weight"],
        ["0.proj.weight", "0.position"],
        ["0"],
    ),
    "a list of parameters": (lambda: nn.Sequential(Listed(), nn.Linear(6, 4)), ["1.weight"], ["0.scales.0"], ["0"]),
    "a name that ends others": (numbered, ["2.weight", "3.weight"], ["1.bias"], ["1"]),
    "a bias of an adapted layer": (numbered, ["2.weight"], ["2.bias"], None),
    "a norm in a block": (lambda: nn.Sequential(Block()), ["0.q.weight"], ["0.norm.weight"], ["0.norm"]),
}


@pytest.mark.parametrize("kind", SAVED)
def test_what_changed_beside_the_factors_goes_out_and_in(kind: str, tmp_path: Path):
    make, targets, names, modules = SAVED[kind]
    model = seeded(make)
    params = changed(model, init(model, rank=2, seed=0, targets=targets, stack=False), names)
    errors = save_adapter(model, params, tmp_path, original=model.state_dict(), rank=4)
    assert max(errors.values()) < 1e-6
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == modules
    assert_read_alike(model, params, tmp_path)


# By reason: the model, what is adapted, what else changed, and the message.
LOST = {
    "beside the layer": (lambda: nn.Sequential(Block()), ["0.q.weight"], ["0.scale"], r"\['0.scale'\]"),
    "above the layer": (
        lambda: nn.Sequential(Patch(), nn.Linear(6, 4)),
        ["0.proj.weight"],
        ["0.position"],
        r"\['0.position'\]",
    ),
    # PEFT takes 11 for 1, and adapts no layer inside of 1
    "the end of an adapted name": (numbered, ["11.weight"], ["1.weight"], r"\['1.weight'\]"),
    "a name inside of an adapted one": (
        lambda: nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), nn.Linear(6, 6)),
        ["0.1.weight"],
        ["1.weight"],
        r"\['1.weight'\]",
    ),
}


@pytest.mark.parametrize("kind", LOST)
def test_a_change_that_peft_cannot_read_is_refused_by_name_or_left_out(kind: str, tmp_path: Path):
    make, targets, names, frozen = LOST[kind]
    model = seeded(make)
    params = changed(model, init(model, rank=2, seed=0, targets=targets, stack=False), names)
    message = rf"`params` has a changed '{names[0]}', which PEFT cannot save .* `partition\(params, frozen={frozen}\)`"
    with pytest.raises(ValueError, match=message):
        save_adapter(model, params, tmp_path, original=model.state_dict())
    assert list(tmp_path.iterdir()) == []
    errors = save_adapter(model, params, tmp_path, original=model.state_dict(), rank=4, skip_unsupported=True)
    assert errors.pop(names[0]) == 1
    assert max(errors.values()) < 1e-6
    kept = {name: model.state_dict()[name] if name in names else param for name, param in params.items()}
    assert_read_alike(model, kept, tmp_path)


def test_what_to_freeze_is_named_as_partition_takes_it(tmp_path: Path):
    model = seeded(lambda: nn.Sequential(*(Block() for _ in range(3))))
    params = init(model, rank=2, seed=0, targets=["*.q.weight"])
    trained = changed(model, params, ["*.scale", "*.norm.weight"])
    with pytest.raises(ValueError, match=r"frozen=\['\*.scale'\]") as caught:
        save_adapter(model, trained, tmp_path, original=model.state_dict())
    assert "norm" not in str(caught.value)
    assert "*.scale" not in partition(params, frozen=["*.scale"])[0]


@pytest.fixture
def normalized(tmp_path: Path) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """A trained model with running statistics, the one before, and the loaded parameters of its adapter."""
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)))
    before = copy.deepcopy(model)
    params = changed(model, init(model, rank=2, seed=0, targets=["0.weight"]), [])
    model[1].running_mean += 2
    model[1].num_batches_tracked += 7
    save_adapter(model, params, tmp_path, original=before.state_dict(), rank=4)
    assert_read_alike(model, params, tmp_path)
    expected = call(model, params, X)
    loaded = load_adapter(before, tmp_path, seed=0, check=(X,))
    torch.testing.assert_close(call(before, loaded, X), expected)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(before), tmp_path).eval()(X)
    torch.testing.assert_close(theirs, expected.detach())
    return model, before, loaded


Normalized = tuple[nn.Module, nn.Module, dict[str, Any]]


def test_changed_running_statistics_go_out_and_come_in(normalized: Normalized, tmp_path: Path):
    model, before, loaded = normalized
    frozen = {name for name, param in loaded.items() if isinstance(param, FrozenTensor)}
    assert frozen == {"1.running_mean", "1.num_batches_tracked"}  # the variance has not changed
    assert not before[1].running_mean.any()
    assert frozen.isdisjoint(partition(loaded)[0])
    weights = state_dict(before, loaded)
    assert weights["1.num_batches_tracked"] == 7
    assert torch.equal(weights["1.running_mean"], model[1].running_mean)
    restored = copy.deepcopy(before)
    restored.load_state_dict(weights)
    torch.testing.assert_close(restored(X), call(before, loaded, X))
    save_adapter(before, loaded, tmp_path / "again", original=before.state_dict(), rank=4)
    save_adapter(before, loaded, tmp_path / "unchanged")
    restored.load_state_dict(dict(open_weights(tmp_path / "unchanged" / "base")))
    again, unchanged = (
        load_adapter(before, tmp_path / "again", seed=0),
        load_adapter(restored, tmp_path / "unchanged", seed=0),
    )
    for base, params in ((before, again), (restored, unchanged)):
        torch.testing.assert_close(call(base, params, X), call(before, loaded, X))


def test_loaded_statistics_go_on_with_training(normalized: Normalized):
    model, before, loaded = normalized
    statistics, x = model[1].running_mean.clone(), X * 3
    before.train()
    explain(loaded, tokens=5, model=before, args=(x,))
    assert torch.equal(loaded["1.running_mean"].tensor, statistics)
    trainable, frozen = partition(loaded)
    for via in ("func", "autograd"):
        value_and_grad(lambda tr: call(before, combine(tr, frozen), x).square().sum(), via=via)(trainable)
    mean = (state_dict(before, loaded)["0.weight"] @ x.T).mean(1) + before[0].bias.detach()
    expected = 0.81 * statistics + (0.09 + 0.1) * mean
    torch.testing.assert_close(loaded["1.running_mean"].tensor, expected)
    assert loaded["1.num_batches_tracked"].tensor == 9
    assert not loaded["1.running_mean"].tensor.requires_grad
    assert not before[1].running_mean.any()


def test_tied_statistics_come_in_once_and_other_values_are_refused(tmp_path: Path):
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.BatchNorm1d(6)))
    model[2].running_mean = model[1].running_mean
    before = copy.deepcopy(model)
    params = changed(model, init(model, rank=2, seed=0, targets=["0.weight"]), [])
    model[1].running_mean += 2
    save_adapter(model, params, tmp_path, original=before.state_dict(), rank=4)
    loaded = load_adapter(before, tmp_path, seed=0)
    assert "2.running_mean" not in loaded
    torch.testing.assert_close(call(before, loaded, X), call(model, params, X))
    file = tmp_path / "adapter_model.safetensors"
    weights = {name: tensor.clone() for name, tensor in open_weights(file).items()}
    weights["base_model.model.2.running_mean"] += 1
    save_weights(weights, file)
    with pytest.raises(ValueError, match=r"other values for '1\.running_mean' than for '2\.running_mean'"):
        load_adapter(before, tmp_path, seed=0)


@pytest.mark.parametrize(("name", "dtype"), [("1.weight", torch.int64), ("1.running_mean", torch.bool)])
def test_a_tensor_of_another_kind_is_refused(name: str, dtype: torch.dtype, normalized: Normalized, tmp_path: Path):
    file = tmp_path / "adapter_model.safetensors"
    weights = {name: tensor.clone() for name, tensor in open_weights(file).items()}
    weights[f"base_model.model.{name}"] = weights[f"base_model.model.{name}"].to(dtype)
    save_weights(weights, file)
    with pytest.raises(ValueError, match=rf"the adapter has dtype {dtype} for 'base_model.model.{name}'"):
        load_adapter(normalized[1], tmp_path, seed=0)


def test_a_changed_buffer_beside_an_adapted_layer_is_refused(tmp_path: Path):
    model = seeded(lambda: nn.Sequential(Block()))
    original = copy.deepcopy(model.state_dict())
    params = changed(model, init(model, rank=2, seed=0, targets=["0.q.weight"]), [])
    model[0].mean += 1
    with pytest.raises(ValueError, match=r"`model` has a changed buffer '0.mean', which PEFT cannot save"):
        save_adapter(model, params, tmp_path, original=original)


def test_the_original_may_come_from_a_file_with_tied_weights_under_one_name(tmp_path: Path):
    model = LLAMA().float()
    save_merged(model, init(model, rank=1, seed=0, targets=["lm_head.weight"]), tmp_path / "model")
    params = changed(model, init(model, rank=2, seed=0, targets=["*.q_proj.weight"]), ["model.embed_tokens.weight"])
    with open_weights(tmp_path / "model") as original:
        save_adapter(model, params, tmp_path, original=original, rank=4)
    assert_read_alike(model, params, tmp_path, TOKENS)


def test_an_adapter_of_nothing_is_refused(tmp_path: Path):
    model = seeded(numbered)
    shared = model.state_dict()
    params = init(model, rank=2, seed=0, targets=["*.weight"], start="lora")
    trained = changed(model, params, [])
    model.load_state_dict(state_dict(model, trained))
    for untrained, original in ((trained, shared), (params, state_dict(model, params))):
        with pytest.raises(
            ValueError, match=r"`original` has the weights of `params`, so that the adapter would be of"
        ):
            save_adapter(model, untrained, tmp_path, original=original)
    assert list(tmp_path.iterdir()) == []


def test_a_small_change_of_a_bfloat16_model_is_one(tmp_path: Path):
    model = seeded(numbered).bfloat16()
    params = init(model, rank=2, seed=0, targets=["*.weight"], start="lora", stack=False)
    param = params["0.weight"]
    params["0.weight"] = param._replace(factors=param.factors._replace(b=param.factors.b + 1e-4))
    errors = save_adapter(model, params, tmp_path, original=model.state_dict())
    assert max(errors.values()) < 0.01  # the weight is formed in float32
    weights = open_weights(tmp_path / "adapter_model.safetensors")
    assert weights["base_model.model.0.lora_B.weight"].abs().max() > 0
    model.load_state_dict(state_dict(model, changed(model, params, [])))
    with pytest.raises(ValueError, match="`original` has the weights of `params`"):
        save_adapter(model, changed(model, params, []), tmp_path, original=model.state_dict())


def test_a_weight_that_did_not_change_has_no_error(tmp_path: Path):
    model = seeded(numbered)
    params = init(model, rank=2, seed=0, targets=["*.weight"], stack=False)
    param = params["0.weight"]
    params["0.weight"] = param._replace(factors=param.factors._replace(b=param.factors.b + 0.2))
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    errors = save_adapter(model, params, tmp_path, original=original, rank=1)
    assert errors.pop("0.weight") > 0
    assert set(errors.values()) == {0.0}
    weights = open_weights(tmp_path / "adapter_model.safetensors")
    assert weights["base_model.model.1.lora_B.weight"].abs().max() == 0


def test_ranks_belong_to_one_layer_where_its_name_ends_another(tmp_path: Path):
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))))
    ranks = {"0.weight": 1, "1.0.weight": 3, "1.1.weight": 2}
    params = changed(model, init(model, rank=ranks, seed=0, targets=list(ranks), stack=False), [])
    save_adapter(model, params, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"] == {"^0": 1, r"1\.1": 2}
    base = copy.deepcopy(model)
    base.load_state_dict(dict(open_weights(tmp_path / "base")))
    with torch.no_grad():
        expected = call(model, params, X)
        torch.testing.assert_close(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()(X), expected)
        torch.testing.assert_close(call(base, load_adapter(base, tmp_path, seed=0), X), expected)


def test_layers_without_lora_are_refused_or_written_into_the_base(tmp_path: Path):
    model = seeded(lambda: nn.Sequential(nn.Conv1d(4, 4, 3, groups=2, padding=1), nn.Linear(6, 4)))
    x, original = normal(0, 2, 4, 6, dtype=torch.float32), copy.deepcopy(model.state_dict())
    params = changed(model, init(model, rank=2, seed=0, targets=["*.weight"], stack=False), [])
    with pytest.raises(ValueError, match=r"`params` has a low-rank '0.weight' of Conv1d in groups"):
        save_adapter(model, params, tmp_path, original=original)
    errors = save_adapter(model, params, tmp_path, original=original, rank=4, skip_unsupported=True)
    assert errors["0.weight"] == 1
    assert errors["1.weight"] < 1e-6
    assert save_adapter(model, params, tmp_path / "with", skip_unsupported=True) == {"1.weight": 0.0}
    base = copy.deepcopy(model)
    base.load_state_dict(dict(open_weights(tmp_path / "with" / "base")))
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "with").eval()(x)
        torch.testing.assert_close(theirs, call(model, params, x))


def test_the_weight_of_the_model_itself_is_refused(tmp_path: Path):
    model = nn.Linear(6, 4)
    params = init(model, rank=2, seed=0, targets=["weight"])
    with pytest.raises(ValueError, match=r"`params` has a low-rank 'weight' of the model itself"):
        save_adapter(model, params, tmp_path)


@pytest.mark.parametrize("rank", [0, -1, 1.5, True])
def test_a_rank_that_is_none_is_refused_by_name(rank: Any, tmp_path: Path):
    model = seeded(numbered)
    params = init(model, rank=2, seed=0, targets=["*.weight"])
    with pytest.raises((ValueError, TypeError), match="`rank` is"):
        save_adapter(model, params, tmp_path, original=model.state_dict(), rank=rank)


def test_factors_and_buffers_are_on_the_device_of_the_model(normalized: Normalized, tmp_path: Path):
    _, before, loaded = normalized
    save_adapter(before, loaded, tmp_path, original=before.state_dict(), rank=4)
    params = load_adapter(copy.deepcopy(before).to("meta"), tmp_path, seed=0)
    assert {name: param.shape for name, param in params.items()}.items() >= {
        n: p.shape for n, p in loaded.items()
    }.items()
    assert {leaf.device.type for leaf in tree_leaves([params[name] for name in loaded])} == {"meta"}
