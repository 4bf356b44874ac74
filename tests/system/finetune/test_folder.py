"""What is refused before anything is written: incomplete models, code, and lengths that the model does not take."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.finetune.load import positions
from tests.support.finetune import SIZES, Given, llama, save_given, settings
from tests.support.pretrain import Job

transformers = pytest.importorskip("transformers")
NAME = "model.layers.1.self_attn.q_proj.weight"


def copied(given: Given, folder: Path) -> Given:
    shutil.copytree(given.model, folder / "model")
    return Given(folder / "model", given.text)


def refusal(job: Job, given: Given, out: Path, **changed: object) -> str:
    """Return the one line that refuses the input, and check that nothing was written."""
    outcome = job(*settings(given, out, **changed))
    assert outcome.code == 2, outcome.out
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert not out.exists()
    return outcome.err


def change_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def change_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    options = json.loads(path.read_bytes())
    change(options)
    path.write_text(json.dumps(options))


WEIGHTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "dropped": (lambda weights: weights.pop(NAME), f"without '{NAME}'"),
    "renamed": (lambda weights: weights.update(other=weights.pop(NAME)), f"without '{NAME}'"),
    "more": (lambda weights: weights.update(other=torch.ones(2)), "with 'other', which would be lost"),
    "no head": (lambda weights: weights.pop("lm_head.weight"), "without 'lm_head.weight'"),
    "another shape": (
        lambda weights: weights.update({NAME: torch.ones(16, 8)}),
        f"with '{NAME}' of shape (16, 8) instead of (16, 16)",
    ),
    "booleans": (
        lambda weights: weights.update({NAME: weights[NAME] > 0}),
        f"with integers or booleans as '{NAME}'",
    ),
    "nan": (lambda weights: weights[NAME].fill_(torch.nan), "`model` must give finite logits"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_do_not_fit_are_named(job: Job, given: Given, tmp_path: Path, name: str):
    change, message = WEIGHTS[name]
    broken = copied(given, tmp_path)
    change_weights(broken.model, change)
    assert message in refusal(job, broken, tmp_path / "run")


OPTIONS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no number of layers": (
        lambda options: options.pop("num_hidden_layers"),
        "without 'model.layers.10.input_layernorm",
    ),
    "no number of heads": (
        lambda options: options.pop("num_attention_heads"),
        "`model` must contain a causal language model",
    ),
    "fewer layers": (
        lambda options: options.update(num_hidden_layers=1),
        "with 'model.layers.1.input_layernorm.weight'",
    ),
    "another size": (lambda options: options.update(intermediate_size=32), "of shape (16, 24) instead of (16, 32)"),
    "code": (
        lambda options: options.update(auto_map={"AutoModelForCausalLM": "code.Model"}),
        "`model` must not have 'auto_map' in config.json",
    ),
    "quantized": (
        lambda options: options.update(quantization_config={"quant_method": "gptq", "bits": 4}),
        "`model` must not have 'quantization_config' in config.json",
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_configuration_that_does_not_fit_is_named(job: Job, given: Given, tmp_path: Path, name: str):
    change, message = OPTIONS[name]
    broken = copied(given, tmp_path)
    change_json(broken.model / "config.json", change)
    assert message in refusal(job, broken, tmp_path / "run")


@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_code_in_a_folder_is_neither_run_nor_asked_about(
    job: Job, given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    broken = copied(given, tmp_path)
    (broken.model / "code.py").write_text(f"open({str(tmp_path / 'run-by-code')!r}, 'w')")
    entry = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.Tokens", None]}
    file = "config.json" if kind == "model" else "tokenizer_config.json"
    change_json(broken.model / file, lambda options: options.update(auto_map=entry, model_type="unknown"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    assert f"`{kind}` must not have 'auto_map' in {file}" in refusal(job, broken, tmp_path / "run")
    assert not (tmp_path / "run-by-code").exists()


def sharded(given: Given, folder: Path) -> Given:
    model = transformers.LlamaForCausalLM.from_pretrained(given.model)
    model.save_pretrained(folder / "model", max_shard_size="6KB")
    for file in given.model.glob("token*"):
        shutil.copy(file, folder / "model")
    return Given(folder / "model", given.text)


def test_shards_that_are_missing_cut_or_left_out_are_named(job: Job, given: Given, tmp_path: Path):
    shards = sharded(given, tmp_path / "a")
    index = shards.model / "model.safetensors.index.json"
    file = json.loads(index.read_bytes())["weight_map"][NAME]
    content, whole = index.read_text(), (shards.model / file).read_bytes()
    change_json(
        index, lambda entries: [entries["weight_map"].pop(key) for key in [*entries["weight_map"]] if ".1." in key]
    )
    assert "without 'model.layers.1." in refusal(job, shards, tmp_path / "run")
    index.write_text(content)
    (shards.model / file).write_bytes(whole[:-8])
    assert file in refusal(job, shards, tmp_path / "run")
    (shards.model / file).unlink()
    assert file in refusal(job, shards, tmp_path / "run")
    (shards.model / file).write_bytes(whole)
    assert job(*settings(shards, tmp_path / "run", steps=1, export="merged")).code == 0


@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_are_absent_rightly_are_no_reason_to_refuse(job: Job, tmp_path: Path, tied: bool):
    given = save_given(llama(tie_word_embeddings=tied), tmp_path)
    change_weights(given.model, lambda weights: weights.update({"model.rotary_emb.inv_freq": torch.ones(4)}))
    outcome = job(*settings(given, tmp_path / "run", steps=1, export="merged"))
    assert outcome.code == 0, outcome.err
    assert ("lm_head.weight" in load_file(tmp_path / "run" / "model" / "model.safetensors")) != tied


def gpt2(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=128, n_positions=16, **sizes, **options))


def opt(**_: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.OPTConfig(vocab_size=128, max_position_embeddings=16, word_embed_proj_dim=16, **sizes)
    return transformers.OPTForCausalLM(config)


@pytest.mark.parametrize("make", [gpt2, opt, lambda: llama(max_position_embeddings=16)], ids=["gpt2", "opt", "llama"])
def test_a_length_beyond_the_positions_is_refused(job: Job, tmp_path: Path, make: Callable[[], Any]):
    given = save_given(make(), tmp_path)
    error = refusal(job, given, tmp_path / "run", **{"seq-len": 17})
    assert "`seq_len` must be at most the positions of the model, 16, got 17" in error
    assert job(*settings(given, tmp_path / "run", steps=1, export="merged", **{"seq-len": 16})).code == 0


def test_positions_that_the_configuration_does_not_count_are_found_by_running(job: Job, tmp_path: Path):
    """RoBERTa's first position is after the one of the padding, so that it takes two tokens fewer."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig(vocab_size=128, max_position_embeddings=18, is_decoder=True, **SIZES)
    given = save_given(transformers.RobertaForCausalLM(config), tmp_path)
    assert "`seq_len` must be a length that the model takes, got 17: " in refusal(
        job, given, tmp_path / "run", **{"seq-len": 17}
    )


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({"max_position_embeddings": 32}, 32),
        ({"max_position_embeddings": 32, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 128),
        (
            {
                "max_position_embeddings": 32,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            },
            64,
        ),
    ],
)
def test_scaled_rotary_positions_reach_further(options: dict[str, Any], limit: int):
    assert positions(transformers.LlamaConfig(**options)) == limit


def test_a_model_without_positions_has_no_limit():
    assert positions(transformers.MambaConfig()) is None


def test_a_model_that_sees_later_tokens_is_refused(job: Job, tmp_path: Path):
    torch.manual_seed(0)
    given = save_given(transformers.BertLMHeadModel(transformers.BertConfig(vocab_size=128, **SIZES)), tmp_path)
    assert "`model` must predict each token from those before it" in refusal(job, given, tmp_path / "run")


def test_a_tokenizer_of_more_tokens_than_the_model_embeds_is_refused(job: Job, given: Given, tmp_path: Path):
    torch.manual_seed(0)
    small = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=100, **SIZES))
    small.save_pretrained(tmp_path / "model")
    error = refusal(job, Given(tmp_path / "model", given.text), tmp_path / "run", tokenizer=given.model)
    assert "`tokenizer` must have at most as many tokens as the model embeds, 100, got 128" in error


def test_a_model_that_could_not_be_written_at_the_end_is_refused_at_the_beginning(
    job: Job, given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("Fix these issues to save the configuration.")

    monkeypatch.setattr(transformers.GenerationConfig, "save_pretrained", fail)
    error = refusal(job, given, tmp_path / "run")
    assert "`model` must be one that `save_pretrained` can write, got LlamaForCausalLM: ValueError: Fix these" in error
