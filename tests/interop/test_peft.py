"""PEFT's adapters in and out, against PEFT itself: the same logits in float32."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynlora_fn import LowRank, call, candidates, init, materialize, merge, state_dict, switch, unstack
from dynlora_fn.interop import load_adapter, open_weights, save_adapter
from dynlora_fn.schedules import every
from dynlora_fn.testing import assert_same, normal
from tests.support.zoo import GPT2, LLAMA, TOKENS

peft = pytest.importorskip("peft")
LOGITS = 1e-5  # by which logits may differ in float32


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv1d(2, 6, 3, padding=1), nn.Conv2d(6, 4, (1, 3))
        self.three, self.head = nn.Conv3d(4, 4, (1, 1, 2)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.two(self.one(x).relu()[:, :, None]).relu()
        return self.head(self.three(hidden[:, :, None]).flatten(1)[:, :8])


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return Convolutions()


def float32(make: Any) -> Any:
    return lambda: make().float()


# By kind: the model, what is adapted, and the model's input.
KINDS = {
    "linear": (float32(LLAMA), ["q_proj", "v_proj", "down_proj"], TOKENS),
    "embedding": (lambda: untied(LLAMA().float()), ["embed_tokens", "o_proj"], TOKENS),
    "convolution": (convolutions, ["one", "two", "three"], normal(0, 2, 2, 7, dtype=torch.float32)),
    "transposed": (float32(GPT2), ["c_attn", "c_fc"], TOKENS),
}


def untied(model: nn.Module) -> nn.Module:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 0.01)
    model.config.tie_word_embeddings = False
    return model


def logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def difference(left: Any, right: Any) -> float:
    return (logits(left) - logits(right)).abs().max().item()


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 2, "lora_alpha": 7},
        {"r": 2, "lora_alpha": 3, "use_rslora": True},
        {"r": 2, "lora_alpha": 4, "rank_pattern": {"v_proj": 3, "two": 1}, "alpha_pattern": {"v_proj": 9, "two": 5}},
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_in(kind, settings, tmp_path):
    make, targets, x = KINDS[kind]
    model = make()
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=False, **settings)
    theirs = peft.get_peft_model(make(), config).eval()
    theirs.save_pretrained(tmp_path)
    params = load_adapter(model, tmp_path, seed=0)
    assert sum(isinstance(param, LowRank) for param in unstack(params).values()) >= 3
    with torch.no_grad():
        assert difference(call(model, params, x), theirs(x)) <= LOGITS
        assert difference(model(x), theirs(x)) > 100 * LOGITS


def trained(kind: str, fused: Any = None) -> tuple[nn.Module, dict[str, Any]]:
    """Return parameters that are far from the model's."""
    make, targets, _ = KINDS[kind]
    model = make()
    names = [f"*.{name}.weight" if kind != "convolution" else f"{name}.weight" for name in targets]
    params = init(model, rank=2, seed=0, targets=names, fused=fused)
    plan = every(1, freeze=0)(0, params)
    params, _ = switch(params, plan, incoming=candidates(params, plan))
    changed = {name: param._replace(factors=type(param.factors)(*(side * 1.5 for side in param.factors)))
               if isinstance(param, LowRank) else param for name, param in params.items()}  # fmt: skip
    return model, changed


def read_by_peft(model: nn.Module, folder: Any) -> nn.Module:
    return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_out_with_the_current_base(kind, tmp_path):
    model, params = trained(kind)
    x = KINDS[kind][2]
    errors = save_adapter(model, params, tmp_path)
    assert set(errors.values()) == {0.0}
    base = copy.deepcopy(model)
    weights = open_weights(tmp_path / "base")
    base.load_state_dict(dict(weights), strict=False)  # tied weights are written once
    with torch.no_grad():
        assert difference(call(model, params, x), read_by_peft(base, tmp_path)(x)) <= LOGITS
    again = load_adapter(base, tmp_path, seed=0)
    for name, param in unstack(again).items():
        if isinstance(param, LowRank):
            torch.testing.assert_close(materialize(param), materialize(unstack(params)[name]))


@pytest.mark.parametrize("kind", KINDS)
def test_out_against_the_original(kind, tmp_path):
    """The switch has replaced all vectors once, so twice the rank represents the full change."""
    model, params = trained(kind)
    x, original = KINDS[kind][2], model.state_dict()
    errors = save_adapter(model, params, tmp_path, original=original, rank=100)
    assert max(errors.values()) < 1e-6
    with torch.no_grad():
        assert difference(call(model, params, x), read_by_peft(model, tmp_path)(x)) <= LOGITS


def test_the_truncation_s_error_is_stated(tmp_path):
    model, params = trained("linear")
    original = model.state_dict()
    errors = save_adapter(model, params, tmp_path, original=original, rank=1)
    again = load_adapter(model, tmp_path, seed=0)
    wanted, got = state_dict(model, params), state_dict(model, again)
    assert len(errors) == 6
    for name, error in errors.items():
        change = (wanted[name] - original[name]).norm()
        assert ((wanted[name] - got[name]).norm() / change).item() == pytest.approx(error, rel=1e-3)
        assert error > 0.05


def test_what_is_trained_full_rank_goes_out_too(tmp_path):
    make, _, x = KINDS["convolution"]
    model = make()
    params = init(model, rank=2, seed=0, targets=["one.weight"])
    params = {name: param if isinstance(param, LowRank) else param + 0.1 for name, param in params.items()}
    save_adapter(model, params, tmp_path, original=model.state_dict())
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["head", "three", "two"]
    with torch.no_grad():
        assert difference(call(model, params, x), read_by_peft(model, tmp_path)(x)) <= LOGITS
        again = load_adapter(model, tmp_path, seed=0)
        assert difference(call(model, params, x), call(model, again, x)) <= LOGITS


def test_fused_weights_go_out_with_all_their_ranks(tmp_path):
    model, params = trained("transposed", fused={"*.c_attn.weight": (3, -1), "*.c_fc.weight": (2, -1)})
    save_adapter(model, params, tmp_path, original=model.state_dict(), rank=100)
    with torch.no_grad():
        assert difference(call(model, params, TOKENS), read_by_peft(model, tmp_path)(TOKENS)) <= LOGITS
    model, params = trained("transposed", fused={"*.c_attn.weight": (3, -1)})
    save_adapter(model, params, tmp_path / "with", original=None)
    config = json.loads((tmp_path / "with" / "adapter_config.json").read_text())
    assert config["r"] == 6
    assert set(config["rank_pattern"].values()) == {2}


def test_tied_weights_are_adapted_in_every_layer(tmp_path):
    model = LLAMA().float()
    params = init(model, rank=2, seed=0, targets=["model.embed_tokens.weight"])
    params = merge(params)
    param = params["model.embed_tokens.weight"]
    params["model.embed_tokens.weight"] = param._replace(factors=param.factors._replace(b=param.factors.b + 0.3))
    save_adapter(model, params, tmp_path, original=model.state_dict())
    with torch.no_grad():
        assert difference(call(model, params, TOKENS), read_by_peft(model, tmp_path)(TOKENS)) <= LOGITS
        again = load_adapter(model, tmp_path, seed=0)
        assert difference(call(model, params, TOKENS), call(model, again, TOKENS)) <= LOGITS


def written(folder: Any, kind: str = "linear", **changed: Any) -> nn.Module:
    model, params = trained(kind)
    save_adapter(model, params, folder, original=model.state_dict())
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    return model


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"peft_type": "IA3"}, "`folder` has an adapter of type 'IA3'; pass one of type 'LORA'"),
        ({"use_dora": True}, "the adapter has use_dora = True, which is not plain LoRA"),
    ],
)
def test_other_adapters_are_refused(changed, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_adapter(written(tmp_path, **changed), tmp_path, seed=0)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    model = written(tmp_path)
    name = "model.layers.1.mlp.down_proj"
    model.get_submodule(name).weight = nn.Parameter(torch.zeros(16, 20))
    with pytest.raises(ValueError, match=rf"factors of \(16, 2\) and \(2, 24\) for '{name}.weight' of \(16, 20\)"):
        load_adapter(model, tmp_path, seed=0)
    with pytest.raises(ValueError, match=r"'base_model.model.model.layers.0.*lora_A.weight' of shape \(2, \d+\)"):
        load_adapter(convolutions(), tmp_path, seed=0)
    with pytest.raises(ValueError, match=r"`folder` has no adapter_config.json in '.*nowhere'"):
        load_adapter(model, tmp_path / "nowhere", seed=0)


def test_layers_that_peft_has_no_adapter_for_are_refused(tmp_path):
    model = nn.Sequential(nn.LSTM(4, 4))
    params = init(model, rank=1, seed=0, targets=["0.weight_ih_l0"])
    with pytest.raises(
        ValueError, match=r"`params` has a low-rank '0.weight_ih_l0' of LSTM, for which PEFT has no LoRA"
    ):
        save_adapter(model, params, tmp_path)
    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2))
    params = init(model, rank=1, seed=0, targets=["0.weight"])
    with pytest.raises(ValueError, match=r"`params` has a low-rank '0.weight' of Conv1d in groups"):
        save_adapter(model, params, tmp_path)


def test_an_original_that_does_not_fit_is_refused(tmp_path):
    model, params = trained("convolution")
    original = model.state_dict() | {"two.weight": torch.zeros(3, 6, 1, 3)}
    with pytest.raises(
        ValueError, match=r"`original` has shape \(3, 6, 1, 3\) for 'two.weight' of shape \(4, 6, 1, 3\)"
    ):
        save_adapter(model, params, tmp_path, original=original)
    with pytest.raises(ValueError, match="`rank` is 3 without `original`"):
        save_adapter(model, params, tmp_path, rank=3)


def test_nothing_is_changed(tmp_path):
    model, params = trained("convolution")
    before = copy.deepcopy((model.state_dict(), params))
    save_adapter(model, params, tmp_path, original=model.state_dict())
    load_adapter(model, tmp_path, seed=0)
    assert_same((dict(model.state_dict()), params), (dict(before[0]), before[1]))
