"""What `load_adapter` refuses by name: settings, tensors, and layers where PEFT changes more than the weight."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynlora_fn as dl
from dynlora_fn.interop._peft_settings import _SETTINGS, _UNSUPPORTED, _WITHOUT_INFLUENCE
from dynlora_fn.testing import assert_same, normal

safetensors = pytest.importorskip("safetensors.torch")

safetensors = pytest.importorskip("safetensors.torch")

PREFIX = "base_model.model."
SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["0", "2"]}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3))


def tensors() -> dict[str, Tensor]:
    shapes = {"0.lora_A": (2, 6), "0.lora_B": (5, 2), "2.lora_A": (2, 5), "2.lora_B": (3, 2)}
    return {
        f"{PREFIX}{name}.weight": normal(seed, *shape, dtype=torch.float32)
        for seed, (name, shape) in enumerate(shapes.items())
    }


def write(folder: Path, file: dict[str, Tensor] | None = None, **settings: Any) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
    safetensors.save_file(tensors() if file is None else file, folder / "adapter_model.safetensors")
    return folder


def test_every_setting_of_the_installed_peft_is_known():
    peft = pytest.importorskip("peft")
    known = _WITHOUT_INFLUENCE | _UNSUPPORTED | _SETTINGS.keys()
    assert peft.LoraConfig(target_modules=["x"]).to_dict().keys() <= known
    assert not _WITHOUT_INFLUENCE & _UNSUPPORTED


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *[
            ({"init_lora_weights": value}, "'init_lora_weights`; use one of".replace("'", f"'{value}' as `"))
            for value in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "future")
        ],
        (
            {"use_dora": True},
            r"the adapter has use_dora = True, which is not plain LoRA \(its magnitude and norm scale the frozen base",
        ),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"kasa_config": {"beta": 1}}, "kasa_config = {'beta': 1}"),
        ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens = \[1\]"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"megatron_config": {"x": 1}}, "megatron_config"),
        ({"arrow_config": {"top_k": 1}}, "arrow_config"),
        ({"setting_of_the_future": 1}, "the unknown setting setting_of_the_future = 1"),
        ({"r": None}, "None as `r`; use an integer of at least 1"),
        ({"r": 0}, "0 as `r`"),
        ({"r": True}, "True as `r`"),
        ({"lora_alpha": "4"}, "'4' as `lora_alpha`; use a finite number"),
        ({"rank_pattern": {"0": 2.5}}, "as `rank_pattern`; use regular expressions"),
        ({"alpha_pattern": {"*(": 2}}, "as `alpha_pattern`"),
        ({"alpha_pattern": [1]}, "as `alpha_pattern`"),
        ({"target_modules": "*("}, r"'\*\(' as `target_modules`"),
        ({"target_modules": "all-linear"}, "'all-linear' as `target_modules`"),
        ({"target_modules": None}, "None as `target_modules`"),
        ({"target_modules": [1]}, r"\[1\] as `target_modules`"),
        ({"modules_to_save": "0"}, "'0' as `modules_to_save`; use names of modules"),
        ({"target_parameters": "0.weight"}, "as `target_parameters`"),
        ({"layers_to_transform": "0"}, "as `layers_to_transform`"),
        ({"bias": "some"}, "'some' as `bias`"),
        ({"use_rslora": 1}, "1 as `use_rslora`"),
    ],
)
def test_settings(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        dl.interop.load_adapter(model(), write(tmp_path, **settings), seed=0)


def test_settings_that_are_off_or_change_no_output_are_taken(tmp_path):
    off = dict.fromkeys([*_UNSUPPORTED, "setting_of_the_future"])
    others = {name: "anything" for name in _WITHOUT_INFLUENCE if name != "peft_type"}
    params = dl.interop.load_adapter(model(), write(tmp_path, **off, **others, use_rslora=None), seed=0)
    assert isinstance(params["0.weight"], dl.LowRank)


def changed(**changes: Tensor | str | None) -> dict[str, Tensor]:
    """Return the file with tensors changed, renamed or dropped, by the key behind the prefix with ``__`` for dots."""
    file = tensors()
    for name, value in changes.items():
        key = PREFIX + name.removeprefix("_").replace("__", ".")
        if isinstance(value, Tensor):
            file[key] = value
        else:
            tensor = file.pop(key)
            if value is not None:
                file[value] = tensor
    return file


@pytest.mark.parametrize(
    ("file", "settings", "message"),
    [
        ({}, {}, "the adapter has no "),
        ({}, {"target_modules": ["q_proj"]}, "has no tensors"),
        (changed(_0__lora_A__weight=None), {}, r"the adapter has no '.*0\.lora_A.weight' beside '.*0\.lora_B.weight'"),
        (changed(_0__lora_B__weight=None), {}, r"the adapter has no '.*0\.lora_B.weight' beside '.*0\.lora_A.weight'"),
        (changed(_0__lora_A__weight=None, _0__lora_B__weight=None), {}, r"the adapter has no '.*0\.lora_A.weight', w"),
        (changed(_0__lora_A__weight=f"{PREFIX}0.LORA_A.weight"), {}, r"has '.*0\.LORA_A.weight' of shape \(2, 6\)"),
        (changed(_0__lora_A__weight="0.lora_A.weight"), {}, r"has '0\.lora_A.weight' of shape \(2, 6\)"),
        (changed(_0__lora_C__weight=torch.ones(2, 2)), {}, r"has '.*0\.lora_C.weight' of shape \(2, 2\)"),
        (changed(_0__lora_A__other__weight=torch.ones(2, 6)), {}, r"has '.*0\.lora_A.other.weight'"),
        (changed(_0__lora_A__default__weight=torch.ones(2, 6)), {}, r"has '.*' and '.*' for one tensor"),
        (changed(_0__lora_magnitude_vector=torch.ones(5)), {}, r"has '.*0\.lora_magnitude_vector'"),
        (changed(_3__lora_A__weight=torch.ones(2, 6)), {}, r"has '.*3\.lora_A.weight' of .* but the model has no '3'"),
        (
            tensors(),
            {"target_modules": ["0"]},
            r"'.*2\.lora_A.weight' of .* select no such tensor of '2', so",
        ),
        (tensors(), {"r": 3}, r"of \(5, 2\) and \(2, 6\) for '0.weight' of \(5, 6\), and the rank 3 for '0'"),
        (tensors(), {"rank_pattern": {"2": 1}}, r"of \(3, 2\) and \(2, 5\) for '2.weight' .* the rank 1 for '2'"),
        (changed(_0__lora_A__weight=torch.ones(0, 6)), {}, r"of \(5, 2\) and \(0, 6\) for '0.weight'"),
        (changed(_0__lora_A__weight=torch.ones(2)), {}, r"of \(5, 2\) and \(2,\) for '0.weight'"),
        (changed(_0__lora_A__weight=torch.ones(2, 7)), {}, r"of \(5, 2\) and \(2, 7\) for '0.weight' of \(5, 6\)"),
        (changed(_0__lora_B__weight=torch.ones(())), {}, r"of \(\) and \(2, 6\) for '0.weight' of \(5, 6\)"),
        (
            changed(_0__lora_A__weight=torch.ones(2, 6, dtype=torch.int32)),
            {},
            "lora_A.weight' of dtype torch.int32",
        ),
        (changed(_0__weight=torch.ones(5, 6)), {}, r"has '.*\.0.weight' of .* select no such tensor of '0.weight'"),
        (changed(_0__base_layer__bias=torch.ones(6)), {}, r"has shape \(6,\) for '.*', but the model has \(5,\)"),
        (tensors(), {"bias": "all"}, "no tensor for '0.bias'"),
        (tensors(), {"target_modules": ["0"], "modules_to_save": ["2"]}, r"'.*2\.lora_A.weight'"),
    ],
)
def test_tensors(file, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        dl.interop.load_adapter(model(), write(tmp_path, file, **settings), seed=0)


def test_a_base_and_a_bias_in_the_file_replace_those_of_the_model(tmp_path):
    weight, bias = normal(5, 5, 6, dtype=torch.float32), normal(6, 5, dtype=torch.float32)
    file = changed(_0__base_layer__weight=weight, _0__base_layer__bias=bias)
    params = dl.interop.load_adapter(model(), write(tmp_path, file), seed=0)
    assert torch.equal(params["0.weight"].base, weight)
    assert torch.equal(params["0.bias"], bias)


def test_the_name_of_the_default_adapter_in_the_keys_is_taken(tmp_path):
    named = {key.replace(".weight", ".default.weight"): tensor for key, tensor in tensors().items()}
    params = dl.interop.load_adapter(model(), write(tmp_path, named), seed=0)
    assert torch.equal(params["0.weight"].factors.a, tensors()[f"{PREFIX}0.lora_A.weight"])


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Cast(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.float(), self.weight, self.bias)


class Shifted(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 1)


class ScaledEmbedding(nn.Embedding):
    embed_scale = 3.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.embed_scale


def hooked() -> nn.Module:
    layer = nn.Linear(6, 5)
    layer.register_forward_hook(lambda module, args, output: output * 2)
    return layer


def recorded() -> nn.Module:
    layer = nn.Linear(6, 5)
    layer.register_forward_hook(lambda module, args, output: None)
    return layer


def shared() -> nn.Module:
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.GELU(), layer)


def twice() -> nn.Module:
    """Return a model in which a block is registered twice, so that its layer is adapted in both places."""
    block = nn.Sequential(nn.Linear(6, 6), nn.GELU())
    return nn.Sequential(block, block)


ENCODER = {"d_model": 6, "nhead": 2, "dim_feedforward": 8, "dropout": 0.0, "batch_first": True}


@pytest.mark.parametrize(
    ("make", "targets", "message"),
    [
        (lambda: nn.Sequential(Scaled(6, 5)), ["0"], "'0.weight' of Scaled, which has a forward method itself"),
        (lambda: nn.Sequential(Shifted(6, 5)), ["0"], "'0.weight' of Shifted, which has a forward method itself"),
        (lambda: nn.Sequential(nn.Embedding(6, 5, max_norm=1.0)), ["0"], "with `max_norm`"),
        (lambda: nn.Sequential(hooked()), ["0"], "'0.weight' of Linear, with forward hooks"),
        (shared, ["0"], "'0.weight' of Linear, a module under the names '0', '2'"),
        (lambda: nn.TransformerEncoderLayer(**ENCODER), ["linear1"], "'linear1.weight' .*TransformerEncoderLayer"),
        (lambda: nn.TransformerEncoderLayer(**ENCODER), ["self_attn"], "'self_attn.in_proj_weight'"),
        (lambda: nn.TransformerEncoderLayer(**ENCODER), ["out_proj"], "'self_attn.out_proj.weight'"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), ["0"], "'0.weight' of Conv2d in groups"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, dilation=2)), ["0"], "with `dilation`"),
        (lambda: nn.Sequential(nn.Bilinear(4, 4, 3)), ["0"], "'0.weight' of Bilinear, for which PEFT has no LoRA"),
    ],
)
def test_layers(make, targets, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        dl.interop.load_adapter(make(), write(tmp_path, {}, target_modules=targets), seed=0)


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: nn.Sequential(Cast(6, 5)), normal(7, 2, 6, dtype=torch.float32)),
        (lambda: nn.Sequential(recorded()), normal(7, 2, 6, dtype=torch.float32)),
        (lambda: nn.Sequential(ScaledEmbedding(6, 5)), torch.tensor([0, 3])),
        (twice, normal(7, 2, 6, dtype=torch.float32)),
    ],
)
def test_layers_that_return_the_product_are_taken(make, x, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    plain = make()
    (name,) = {name for name, _ in plain.named_parameters() if name.endswith("weight")}
    settings = {"target_modules": [name.removesuffix(".weight")], "init_lora_weights": False}
    theirs = peft.get_peft_model(plain, peft.LoraConfig(**settings)).eval()
    theirs.save_pretrained(tmp_path)
    wanted = theirs(x)
    torch.manual_seed(0)
    params = dl.interop.load_adapter(make(), tmp_path, seed=0, check=(x,))
    torch.manual_seed(0)
    torch.testing.assert_close(dl.call(make(), params, x), wanted)


class ReadsItsChild(nn.Module):
    """Uses the weight of a layer without calling it, which no type tells."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.layer.weight)


def test_a_check_finds_what_types_cannot_tell(tmp_path):
    pytest.importorskip("peft")
    torch.manual_seed(0)
    reading = ReadsItsChild()
    file = {key.replace(".0.", ".layer."): tensor for key, tensor in tensors().items() if ".0." in key}
    write(tmp_path, file, target_modules=["layer"])
    x = normal(7, 2, 6, dtype=torch.float32)
    dl.interop.load_adapter(reading, tmp_path, seed=0)
    with pytest.raises(ValueError, match="`check` gives outputs that differ from PEFT's by"):
        dl.interop.load_adapter(reading, tmp_path, seed=0, check=(x,))
    with pytest.raises(TypeError, match="`check` is a Tensor; pass a tuple or a dict"):
        dl.interop.load_adapter(reading, tmp_path, seed=0, check=x)
    for dtype in (torch.bfloat16, torch.float16):  # whose roundings are as large as the difference
        with pytest.raises(ValueError, match="`check` gives outputs that differ from PEFT's by"):
            dl.interop.load_adapter(reading.to(dtype), tmp_path, seed=0, check=(x.to(dtype),))
    assert reading.layer.weight.dtype == torch.float16


class Wrapped:
    """An output in which no tree finds a tensor."""

    def __init__(self, value: Tensor):
        self.value = value


def test_a_check_that_compares_nothing_is_refused(tmp_path):
    pytest.importorskip("peft")
    reading = ReadsItsChild()
    reading.register_forward_hook(lambda module, args, output: Wrapped(output))
    file = {key.replace(".0.", ".layer."): tensor for key, tensor in tensors().items() if ".0." in key}
    write(tmp_path, file, target_modules=["layer"])
    with pytest.raises(ValueError, match="`check` gives no floating tensors to compare"):
        dl.interop.load_adapter(reading, tmp_path, seed=0, check=(normal(7, 2, 6, dtype=torch.float32),))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.tensor([False, True, False, False, False])
        return self.layer(x).masked_fill(mask, -torch.inf)


def test_a_check_takes_equal_infinities(tmp_path):
    pytest.importorskip("peft")
    file = {key.replace(".0.", ".layer."): tensor for key, tensor in tensors().items() if ".0." in key}
    write(tmp_path, file, target_modules=["layer"])
    dl.interop.load_adapter(Masked(), tmp_path, seed=0, check=(normal(7, 2, 6, dtype=torch.float32),))


def test_a_pickled_adapter_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(SETTINGS))
    with pytest.raises(ValueError, match=r"`folder` has no adapter_model\.safetensors in .*; add the file"):
        dl.interop.load_adapter(model(), tmp_path, seed=0)
    torch.save(tensors(), tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors in .*; load and save it with PEFT"):
        dl.interop.load_adapter(model(), tmp_path, seed=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_nothing(dtype: torch.dtype, tmp_path):
    class Counted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    write(tmp_path)
    plain = nn.Sequential(Counted(6, 5), nn.GELU(), nn.Linear(5, 3))
    params = dl.interop.load_adapter(plain, tmp_path, seed=0)
    original = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    moved = params | {
        "2.weight": params["2.weight"]._replace(factors=params["2.weight"].factors._replace(b=torch.zeros(3, 2)))
    }
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        again = dl.interop.load_adapter(plain, tmp_path, seed=0)
        errors = dl.interop.save_adapter(plain, moved, tmp_path / "out", original=original)
    finally:
        torch.set_default_dtype(before)
    assert_same(again, params)
    assert errors["2.weight"] == 0
    assert not dl.interop.open_weights(tmp_path / "out" / "adapter_model.safetensors")[f"{PREFIX}2.lora_B.weight"].any()


def test_factors_in_float64_go_out_and_come_in_bit_for_bit(tmp_path):
    params = dl.init(model().double(), rank=2, seed=0, targets=["0.weight"], dtype=torch.float64)
    dl.interop.save_adapter(model().double(), params, tmp_path)
    base = model().double()
    base.load_state_dict(dict(dl.interop.open_weights(tmp_path / "base")))
    loaded = dl.interop.load_adapter(base, tmp_path, seed=0, dtype=torch.float64)
    assert_same(loaded["0.weight"].factors, params["0.weight"].factors)
