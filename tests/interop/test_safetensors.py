"""State dicts in files: merged models, single and sharded safetensors, and what is wrong with them."""

import json
import subprocess
import sys
import weakref
from collections.abc import Mapping

import pytest
import torch
from torch import nn

from dynlora_fn import LowRank, call, init, state_dict
from dynlora_fn.interop import open_weights, save_merged, save_weights
from dynlora_fn.testing import assert_same
from tests.support.paths import ROOT
from tests.support.zoo import CASES, TOKENS, model_and_params

transformers = pytest.importorskip("transformers")
NAMES = ["Llama: linear, grouped heads", "Llama: tied embedding and head", "GPT-2: Conv1D, fused QKV as a stack"]


@pytest.mark.parametrize("name", [*NAMES, "Mixtral: experts, batched", "ViT: patch convolution"])
def test_a_merged_model_is_what_transformers_loads(name, tmp_path):
    model, params = model_and_params(CASES[name])
    params = {key: param if isinstance(param, LowRank) else param * 1.1 for key, param in params.items()}
    save_merged(model, params, tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert_same(dict(loaded.state_dict()), state_dict(model, params))


def test_a_merged_module_is_a_state_dict(tmp_path):
    model, params = model_and_params(CASES["convolutions: 1d, 2d, 3d"])
    save_merged(model, params, tmp_path / "deep" / "folder")
    got = open_weights(tmp_path / "deep" / "folder")
    assert_same(dict(sorted(got.items())), dict(sorted(state_dict(model, params).items())))
    assert len(got) == len(list(got)) == len(model.state_dict())


def test_tied_tensors_are_written_under_both_names(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3)
    save_weights({"one": weight, "two": weight, "turned": weight.T}, tmp_path / "file.safetensors")
    assert_same(dict(open_weights(tmp_path / "file.safetensors")), {"one": weight, "turned": weight.T, "two": weight})


class Watched(Mapping):
    """Counts the tensors that are still referenced, each time that another is read."""

    def __init__(self, weights):
        self.weights, self.alive, self.most = weights, weakref.WeakSet(), 0

    def __getitem__(self, name):
        tensor = self.weights[name]
        self.alive.add(tensor)
        self.most = max(self.most, len(self.alive))
        return tensor

    def __iter__(self):
        return iter(self.weights)

    def __len__(self):
        return len(self.weights)


def test_sharded_weights_are_read_a_stack_at_a_time(tmp_path):
    source, _ = model_and_params(CASES["Llama: tied embedding and head"])
    source.save_pretrained(tmp_path, max_shard_size="8KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    with torch.device("meta"):
        empty = type(source)(source.config).double()
    weights = Watched(open_weights(tmp_path))
    settings = {"rank": 2, "seed": 0, "targets": ["*_proj.weight"], "dtype": torch.float64}
    params = init(empty, weights=weights, **settings)
    assert_same(params, init(source, **settings))
    assert weights.most <= source.config.num_hidden_layers + 1
    torch.testing.assert_close(call(source, params, TOKENS).logits, source(TOKENS).logits.detach())


def test_a_tensor_with_one_entry_is_written_whatever_its_strides(tmp_path):
    """Torch calls such a tensor contiguous, but does not view its bytes."""
    numbers = torch.arange(12.0)
    weights = {"vector": numbers[1::2][:1], "matrix": numbers.view(3, 4)[1:2, 2:3], "scalar": numbers[7]}
    assert weights["vector"].stride() == (2,)
    save_weights(weights, tmp_path / "model.safetensors")
    read = open_weights(tmp_path / "model.safetensors")
    assert_same({name: read[name] for name in weights}, weights)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"`path` has no model.safetensors or .*index.json in '.*'"):
        open_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match=r"`path` is not a complete safetensors file: '.*model.safetensors'"):
        open_weights(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    save_weights({"w": torch.zeros(2)}, tmp_path / "first.safetensors")
    index = {"weight_map": {"w": "first.safetensors", "v": "first.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index.json names the tensor 'v', which is not in 'first.safetensors'"):
        open_weights(tmp_path)
    index["weight_map"]["v"] = "second.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names the file 'second.safetensors', which is not in its folder"):
        open_weights(tmp_path)


def test_parameters_of_another_model_are_refused():
    model = nn.Linear(3, 2)
    params = init(nn.Linear(3, 3), rank=1, seed=0, targets=["weight"])
    with pytest.raises(ValueError, match=r"`params` has shape \(3, 3\) for 'weight', which does not fit .* \(2, 3\)"):
        state_dict(model, params)
    with pytest.raises(ValueError, match=r"`params` has shape \(3,\) for 'bias', but the model has \(2,\)"):
        state_dict(model, {"weight": torch.zeros(2, 3), "bias": params["bias"]})
    with pytest.raises(ValueError, match=r"`params` has no 'bias' of shape \(2,\); pass every parameter of the model"):
        state_dict(model, {"weight": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="`params` has 'other', which the model does not have"):
        state_dict(model, {"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "other": torch.zeros(1)})


@pytest.mark.slow
def test_without_the_extra_it_is_named():
    script = (
        "import sys; sys.modules['safetensors'] = sys.modules['safetensors.torch'] = None\n"
        "import dynlora_fn as dl, torch\n"
        "try: dl.interop.save_weights({'w': torch.zeros(1)}, '/dev/null')\n"
        "except ImportError as error: assert 'dynlora-fn[files]' in str(error), error\n"
        "else: raise SystemExit('no error')"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_a_single_file_goes_before_an_index_as_in_transformers(tmp_path):
    for name, value in (("model", 1), ("part", 2)):
        save_weights({"w": torch.tensor([value])}, tmp_path / f"{name}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "part.safetensors"}}))
    assert open_weights(tmp_path)["w"] == 1
    assert open_weights(index)["w"] == 2


def test_different_weights_for_one_tied_parameter_are_refused():
    tied = nn.ModuleDict({"first": nn.Linear(3, 3, bias=False), "second": nn.Linear(3, 3, bias=False)})
    tied["second"].weight = tied["first"].weight
    weight = torch.ones(3, 3)
    weights = state_dict(tied, {"first.weight": weight, "second.weight": weight})
    assert weights["first.weight"] is weights["second.weight"]
    assert_same(weights["second.weight"], weight)
    with pytest.raises(ValueError, match=r"`params` has different weights for 'first\.weight' and 'second\.weight'"):
        state_dict(tied, {"first.weight": weight, "second.weight": 2 * weight})


def test_a_hook_that_copies_parameters_is_refused_and_one_that_renames_them_is_not():
    params = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    renaming, copying = nn.Linear(3, 2), nn.Linear(3, 2)
    renaming.register_state_dict_post_hook(lambda _, tensors, prefix, __: tensors.update(w=tensors.pop("weight")))
    copying.register_state_dict_post_hook(
        lambda _, tensors, prefix, __: tensors.update(w=tensors.pop("weight").clone())
    )
    assert_same(dict(state_dict(renaming, params)), {"bias": params["bias"], "w": params["weight"]})
    with pytest.raises(ValueError, match=r"`model` has a `state_dict` without its 'weight', but with the tensors 'w'"):
        state_dict(copying, params)
