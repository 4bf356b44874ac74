"""Merged models have the trained weights, in the files that the model's library reads."""

import copy
import importlib
import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynlora_fn import LowRank, call, init, merge, state_dict
from dynlora_fn.interop import FrozenTensor, _transformers, open_weights, save_merged, save_weights
from dynlora_fn.interop import _save as saving
from dynlora_fn.interop._lazy import LazyTensor
from dynlora_fn.interop._state_dict import lazy_state_dict
from dynlora_fn.testing import assert_same
from tests.support.zoo import GPT2, LLAMA, TOKENS, VIT, mixtral, of_transformers

pytest.importorskip("safetensors.torch")
SHARD = 6000  # bytes

# Tied embeddings of an encoder and a decoder, and buffers in a state dict.
T5 = of_transformers("T5ForConditionalGeneration", vocab_size=31, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2)
RESNET = of_transformers("ResNetModel", embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
MODELS = {
    "Llama": (LLAMA, ["*_proj.weight"]),
    "GPT-2": (GPT2, ["*.c_attn.weight", "transformer.wte.weight"]),
    "Mixtral": (mixtral("eager"), ["*.experts.*", "*.q_proj.weight"]),
    "ViT": (VIT, [nn.Linear, nn.Conv2d]),
    "T5": (T5, ["shared.weight", "*.q.weight"]),
    "ResNet": (RESNET, [nn.Conv2d]),
}


def trained(model: nn.Module, targets: Any) -> dict[str, Any]:
    """Return parameters that all differ from the model's."""
    params = init(model, rank=2, seed=0, targets=targets)
    return {
        name: merge(param)._replace(factors=type(param.factors)(*(side + 0.1 for side in param.factors)))
        if isinstance(param, LowRank)
        else param + 0.5
        if isinstance(param, Tensor)
        else param  # frozen, as the base of a model of PEFT is
        for name, param in params.items()
    }


def loaded(model: nn.Module, params: dict[str, Any]) -> Any:
    """Return a copy of the model with the trained weights."""
    copied = copy.deepcopy(model)
    copied.load_state_dict(state_dict(model, params))
    return copied


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", MODELS)
def test_the_files_are_those_of_transformers(name: str, tmp_path: Path):
    make, targets = MODELS[name]
    model = make()
    params = trained(model, targets)
    loaded(model, params).save_pretrained(tmp_path / "theirs")
    save_merged(model, params, tmp_path / "ours")
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")
    read = type(model).from_pretrained(tmp_path / "ours")
    assert_same(dict(read.state_dict()), state_dict(model, params))


def test_shards_and_index_are_those_of_transformers(tmp_path: Path):
    model = LLAMA()
    params = trained(model, ["*_proj.weight"])
    loaded(model, params).save_pretrained(tmp_path / "theirs", max_shard_size=SHARD)
    (tmp_path / "ours").mkdir()
    _transformers.write_pretrained(model, lazy_state_dict(model, params), tmp_path / "ours", max_shard_size=SHARD)
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 3


@pytest.mark.parametrize(("name", "most"), [("Llama", 1), ("GPT-2", 1), ("Mixtral", 3)])
def test_weights_are_formed_one_at_a_time_or_as_they_are_converted(name: str, most: int, tmp_path: Path):
    make, targets = MODELS[name]
    model = make()
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    counts = []

    def watched(weight: LazyTensor) -> LazyTensor:
        def read() -> Tensor:
            tensor = weight.read().clone()
            alive.add(tensor)
            counts.append(len(alive))
            return tensor

        return weight._replace(read=read)

    weights = lazy_state_dict(model, trained(model, targets))
    watchers = {id(weight): watched(weight) for weight in weights.values()}
    _transformers.write_pretrained(model, {key: watchers[id(weight)] for key, weight in weights.items()}, tmp_path)
    assert max(counts) <= most
    assert len(counts) == len(watchers)


def test_the_internal_functions_of_transformers_are_where_they_were():
    pytest.importorskip("transformers", minversion="5")
    loading = importlib.import_module("transformers.core_model_loading")
    modeling = importlib.import_module("transformers.modeling_utils")
    assert callable(loading.revert_weight_conversion)
    assert callable(modeling.remove_tied_weights_from_state_dict)


def test_weights_that_are_converted_together_form_a_group():
    weights = {
        name: LazyTensor((2, 3), torch.float32, lambda: torch.ones(2, 3)) for name in ("q", "k", "v", "gate", "x")
    }

    def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        results = {"renamed": tensors["x"]} if "x" in tensors else {}
        if parts := [tensors[name] for name in ("q", "k", "v") if name in tensors]:
            results["qkv"] = torch.cat(parts)
        if "gate" in tensors:
            results |= {f"gate.{index}": row for index, row in enumerate(tensors["gate"].unbind())}
        return results

    results = _transformers.converted(convert, weights)
    assert {name: result.shape for name, result in results.items()} == {
        "renamed": (2, 3), "qkv": (6, 3), "gate.0": (3,), "gate.1": (3,)
    }  # fmt: skip
    for result in results.values():
        assert torch.equal(result.read(), torch.ones(result.shape))

    def needs_all(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sum": sum(tensors[name] for name in weights)}

    assert torch.equal(_transformers.converted(needs_all, weights)["sum"].read(), torch.full((2, 3), 5.0))


def test_models_that_transformers_would_save_otherwise_are_refused(tmp_path: Path):
    model = LLAMA()
    params = trained(model, ["*_proj.weight"])
    model.hf_quantizer = object()
    with pytest.raises(ValueError, match=r"`model` is a quantized LlamaForCausalLM"):
        save_merged(model, params, tmp_path / "folder")
    del model.hf_quantizer
    model._hf_peft_config_loaded = True
    with pytest.raises(ValueError, match=r"`model` is a LlamaForCausalLM with an adapter in it"):
        save_merged(model, params, tmp_path / "folder")
    model._hf_peft_config_loaded = False
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    with pytest.raises(ValueError, match=r"LlamaForCausalLM with weights that share memory, .*up_proj"):
        save_merged(model, init(model, rank=2, seed=0, targets=["*.q_proj.weight"]), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


class Base(nn.Module):
    """A model with tied weights and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(6)
        self.norm.running_mean += 3

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(self.first(x)))


class OfDiffusers(Base):
    """Saves like `ModelMixin` of diffusers, whose `save_pretrained` ignores arguments that it does not know."""

    def save_pretrained(
        self,
        save_directory: str,
        is_main_process: bool = True,
        save_function: Any = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        Path(save_directory, "config.json").write_text(json.dumps({"_class_name": "OfDiffusers"}))
        weights = {name: tensor for name, tensor in self.state_dict().items() if name != "second.weight"}
        names = list(weights)
        where = {}
        for shard in range(2):
            file = f"diffusion_pytorch_model-0000{shard + 1}-of-00002.safetensors"
            where |= dict.fromkeys(names[shard::2], file)
            save_weights({name: weights[name] for name in names[shard::2]}, Path(save_directory, file))
        index = Path(save_directory, "diffusion_pytorch_model.safetensors.index.json")
        index.write_text(json.dumps({"weight_map": where}))


class Pickled(Base):
    def save_pretrained(self, folder: str) -> None:
        torch.save({"model": self.state_dict()}, Path(folder, "pytorch_model.bin"))


class Halved(Base):
    def save_pretrained(self, folder: str) -> None:
        save_weights({name: tensor.half() for name, tensor in self.state_dict().items()}, Path(folder, "w.safetensors"))


class Headless(Base):
    def save_pretrained(self, folder: str) -> None:
        save_weights(dict(self.first.state_dict()), Path(folder, "w.safetensors"))


class Fails(Base):
    def save_pretrained(self, folder: str, token: str) -> None:
        raise NotImplementedError


class Uncopied(Base):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("cannot pickle")

    def save_pretrained(self, folder: str) -> None:
        torch.save(self.state_dict(), Path(folder, "pytorch_model.bin"))


def test_other_models_save_a_copy_with_the_trained_weights(tmp_path: Path):
    model = OfDiffusers()
    params, before = trained(model, ["first.weight"]), copy.deepcopy(model.state_dict())
    save_merged(model, params, tmp_path)
    files = [file for file in contents(tmp_path) if file.endswith(".safetensors")]
    weights = {name: tensor for file in files for name, tensor in open_weights(tmp_path / file).items()}
    expected = state_dict(model, params)
    assert set(weights) == set(expected) - {"second.weight"}
    assert_same(weights, {name: expected[name] for name in weights})
    assert len(contents(tmp_path)) == 4
    assert_same(dict(model.state_dict()), dict(before))


def test_buffers_of_the_parameters_are_in_a_copy(tmp_path: Path):
    model = OfDiffusers()
    params = trained(model, ["first.weight"]) | {"norm.running_mean": FrozenTensor(torch.full((6,), 7.0))}
    save_merged(model, params, tmp_path)
    files = [file for file in contents(tmp_path) if file.endswith(".safetensors")]
    weights = {name: tensor for file in files for name, tensor in open_weights(tmp_path / file).items()}
    assert weights["norm.running_mean"].unique() == 7
    assert model.norm.running_mean.unique() == 3


def test_a_model_that_pickles_its_weights_is_read_back(tmp_path: Path):
    model = Pickled()
    params = trained(model, ["first.weight"])
    save_merged(model, params, tmp_path)
    assert_same(dict(torch.load(tmp_path / "pytorch_model.bin")["model"]), state_dict(model, params))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Halved, "is a Halved, whose `save_pretrained` did not write the trained 'first.weight', 'first.bias', "),
        (Headless, "is a Headless, whose `save_pretrained` did not write the trained 'second.bias', 'norm.weight'"),
        (Fails, r"is a Fails, and `save_pretrained` of a copy with the trained weights failed \(TypeError: "),
        (Uncopied, r"is a Uncopied, and `save_pretrained` of a copy .* failed \(TypeError: cannot pickle\)"),
    ],
)
def test_a_model_that_would_lose_what_was_trained_is_refused(kind: Any, message: str, tmp_path: Path):
    model = kind()
    save_weights({"old": torch.ones(2)}, tmp_path / "w.safetensors")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message):
        save_merged(model, trained(model, ["first.weight"]), tmp_path)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_what_was_not_trained_need_not_be_saved(tmp_path: Path):
    model = Headless()
    params = init(model, rank=2, seed=0, targets=["first.weight"], start="lora")
    params["first.bias"] = params["first.bias"] + 1
    save_merged(model, params, tmp_path)
    assert_same(open_weights(tmp_path / "w.safetensors")["bias"], state_dict(model, params)["first.bias"])


def test_a_model_of_the_hub_reads_what_was_trained(tmp_path: Path):
    hub = pytest.importorskip("huggingface_hub")

    class OfHub(nn.Module, hub.PyTorchModelHubMixin):
        def __init__(self, size: int = 4):
            super().__init__()
            self.linear = nn.Linear(size, size)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    model, x = OfHub(6), torch.ones(1, 6)
    params = trained(model, [nn.Linear])
    (tmp_path / "README.md").write_text("mine")
    save_merged(model, params, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(OfHub.from_pretrained(tmp_path)(x), call(model, params, x))
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_model_of_peft_saves_its_adapter_and_refuses_a_changed_base(tmp_path: Path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(LLAMA().float(), config).eval()
    params = init(model, rank=1, seed=0, targets=["*lora_A.default.weight"], start="lora")
    name = next(name for name, param in params.items() if isinstance(param, LowRank))
    param = params[name]
    params[name] = param._replace(factors=param.factors._replace(b=param.factors.b + 0.1))
    save_merged(model, params, tmp_path)
    read = peft.PeftModel.from_pretrained(LLAMA().float(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(read(TOKENS).logits, call(model, params, TOKENS).logits)
    params = trained(model, ["*base_layer.weight"])
    with pytest.raises(ValueError, match=r"is a PeftModel.*, whose `save_pretrained` did not write the trained "):
        save_merged(model, params, tmp_path)


def test_weights_of_an_earlier_model_are_removed(tmp_path: Path):
    model = nn.Sequential(nn.Linear(6, 4))
    params = trained(model, ["0.weight"])
    old = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for index, file in enumerate(old):
        save_weights({f"{index}.weight": torch.zeros(4, 6)}, tmp_path / file)
    where = {f"{index}.weight": file for index, file in enumerate(old)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    save_weights({"mine": torch.ones(1)}, tmp_path / "other.safetensors")
    (tmp_path / "notes.txt").write_text("mine")
    save_merged(model, params, tmp_path)
    assert sorted(contents(tmp_path)) == ["model.safetensors", "notes.txt", "other.safetensors"]
    assert_same(dict(sorted(open_weights(tmp_path).items())), dict(sorted(state_dict(model, params).items())))


def test_a_file_in_place_of_the_folder_and_a_folder_in_place_of_a_file_are_refused(tmp_path: Path):
    model = nn.Sequential(nn.Linear(6, 4))
    params = trained(model, ["0.weight"])
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"`folder` is '.*file', which exists and is not a folder"):
        save_merged(model, params, tmp_path / "file")
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"`folder` has 'model.safetensors', which exists and is not a regular file"):
        save_merged(model, params, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model.safetensors"]


def test_what_the_disk_changes_is_noticed_before_a_file_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    replacing = saving._replacing

    class Damaging:
        """A file that reads its last bit turned."""

        def __init__(self, stream: Any):
            self.write, self.seek, self.tell, self._read = stream.write, stream.seek, stream.tell, stream.read

        def read(self, size: int) -> bytes:
            content = self._read(size)
            return content[:-1] + bytes([content[-1] ^ (size == 4 * 6 * 4)])

    @contextmanager
    def damaged(file: Path) -> Iterator[Any]:
        with replacing(file) as stream:
            yield Damaging(stream)

    monkeypatch.setattr(saving, "_replacing", damaged)
    model = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(OSError, match=r"has another tensor '0.weight' than was written"):
        save_merged(model, trained(model, ["0.weight"]), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_extra_state_is_refused_by_name(tmp_path: Path):
    class WithState(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"calls": 3}

        def set_extra_state(self, state: Any) -> None:
            pass

    model = nn.Sequential(WithState(6, 4))
    with pytest.raises(ValueError, match=r"`model` has the extra state '0._extra_state', which is not a tensor"):
        save_merged(model, init(model, rank=2, seed=0, targets=["0.weight"]), tmp_path)
