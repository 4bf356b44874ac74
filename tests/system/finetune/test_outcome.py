"""The fine-tuning job from the command line: what it leaves, its bitwise resumption, and its errors for bad input."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.finetune.config import Config, Optimization
from models.pretrain.learning_rate import dense_lr_scale
from tests.support.finetune import settings

transformers = pytest.importorskip("transformers")


@pytest.mark.slow
def test_it_leaves_a_model_and_an_adapter(job, given, tmp_path):
    peft = pytest.importorskip("peft")
    outcome = job(*settings(given, tmp_path / "run", **{"adapter-rank": 16, "steps": 60}))
    assert outcome.code == 0, outcome.err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.97 * lines[0]["loss"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["switched"] > 0
    kind = transformers.LlamaForCausalLM
    merged = kind.from_pretrained(tmp_path / "run" / "model").eval()
    before = kind.from_pretrained(given[0]).eval()
    adapted = peft.PeftModel.from_pretrained(kind.from_pretrained(given[0]), tmp_path / "run" / "adapter").eval()
    tokens = torch.tensor([[ord(letter) for letter in "the lazy dog"]])
    with torch.no_grad():
        torch.testing.assert_close(adapted(tokens).logits, merged(tokens).logits, rtol=0, atol=1e-5)
        assert (before(tokens).logits - merged(tokens).logits).abs().max() > 1e-2
    assert torch.equal(before.model.embed_tokens.weight, merged.model.embed_tokens.weight)


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(job, given, tmp_path):
    assert job(*settings(given, tmp_path / "whole", export="merged")).code == 0
    assert job(*settings(given, tmp_path / "part", export="merged")).code == 0
    for name in ("step-00000020",):  # as if it had been killed after the first checkpoint
        for file in (tmp_path / "part" / "checkpoints" / name).iterdir():
            file.unlink()
        (tmp_path / "part" / "checkpoints" / name).rmdir()
    outcome = job(*settings(given, tmp_path / "part", export="merged"), "--resume")
    assert "continuing after step 10" in outcome.out
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    "changed",
    [{"method": "lora"}, {"method": "relora", "merge-every": 5}, {"method": "full"}, {"base-dtype": "int8"}],
)
def test_every_method_runs(job, given, tmp_path, changed):
    outcome = job(*settings(given, tmp_path / "run", steps=10, export="merged", **changed), "--train-rest")
    assert outcome.code == 0, outcome.err
    assert f"for validation, {given[0]}" in " ".join(outcome.out.split())
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "run" / "model")
    before = transformers.LlamaForCausalLM.from_pretrained(given[0])
    assert not torch.equal(before.model.embed_tokens.weight, merged.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "nowhere"}, "`model` must be a folder with config.json, got 'nowhere'"),
        ({"rank": 99}, "`rank` is 99 for 'model.layers.0.self_attn.q_proj.weight' of shape (16, 16)"),
        ({"targets": "no.such"}, "`targets` contains 'no.such', which matches no name"),
        ({"text": "nothing.txt"}, "`text` must name files or folders, got 'nothing.txt', which does not exist"),
        ({"adapter-rank": 0}, "`adapter_rank` must be at least 1, got 0"),
        ({"optimizer": "muon", "weight-decay": 0.1}, "`weight_decay` must be 0 for factors that muon trains, got 0.1"),
    ],
)
def test_bad_input_is_one_line(job, given, tmp_path, changed, message):
    outcome = job(*settings(given, tmp_path / "run", **changed))
    assert outcome.code == 2
    assert outcome.err.startswith("error: ")
    assert message in outcome.err
    assert not (tmp_path / "run").exists()


def test_a_damaged_model_is_named(job, given, tmp_path):
    shutil.copytree(given.model, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    outcome = job(*settings(given, tmp_path / "run", model=tmp_path / "model", tokenizer=given[0]))
    assert outcome.code == 2
    assert "`model` must contain a causal language model" in outcome.err


def test_what_is_trained_beside_factors_has_their_rate_unless_told():
    assert dense_lr_scale(Config(optimization=Optimization(optimizer="muon"))) == 1
    rates = Optimization(optimizer="muon", lr=1e-3, dense_lr=2e-3)
    assert dense_lr_scale(Config(optimization=rates)) == 2


def test_pipelines_and_peft_open_what_it_leaves(job, given, tmp_path):
    peft = pytest.importorskip("peft")
    outcome = job(*settings(given, tmp_path / "run", method="lora", steps=10))
    assert outcome.code == 0, outcome.err
    assert "adapter/ of rank 4 has a validation loss of" in outcome.out
    tokens = torch.tensor([[ord(letter) for letter in "the lazy dog"]])
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(adapted(tokens).logits, merged(tokens).logits, rtol=0, atol=1e-5)
    for part in ("model", "adapter"):
        generate = transformers.pipeline("text-generation", str(tmp_path / "run" / part), device="cpu")
        assert generate("the ", max_new_tokens=3)[0]["generated_text"].startswith("the ")


def test_an_adapter_that_misses_something_says_what(job, given, tmp_path):
    options = {"interval": 10, "ratio": 100.0, "steps": 40, "adapter-rank": 1, "optimizer": "muon"}
    outcome = job(*settings(given, tmp_path / "run", **options))
    line = next(line for line in outcome.out.splitlines() if line.startswith("adapter/ of rank 1"))
    adapted, trained = (float(number) for number in re.findall(r"\d\.\d{4}", line))
    assert adapted > trained
    assert line.endswith("; a larger --adapter-rank is more accurate")
    assert trained == pytest.approx(
        json.loads((tmp_path / "run" / "summary.json").read_text())["validation_loss"], abs=1e-3
    )


def test_a_changed_model_is_noticed_on_resume_and_a_moved_one_is_not(job, given, tmp_path):
    shutil.copytree(given.model, tmp_path / "model")
    options = {"steps": 4, "save-every": 2, "export": "merged", "model": tmp_path / "model"}
    assert job(*settings(given, tmp_path / "run", **options)).code == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"model.norm.weight": weights["model.norm.weight"] + 1}, file, metadata={"format": "pt"})
    outcome = job(*settings(given, tmp_path / "run", **options), "--resume")
    assert outcome.code == 2
    assert "model_digest was" in outcome.err
    options |= {"model": given.model, "eval-every": 3, "export": "both"}
    outcome = job(*settings(given, tmp_path / "run", **options), "--resume")
    assert outcome.code == 0, outcome.err
    assert "continuing after step 2" in outcome.out
