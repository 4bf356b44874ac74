"""The fine-tuning job from the command line: what it leaves, its bitwise resumption, and its errors for bad input."""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from models.finetune.__main__ import main
from models.finetune.config import Config, Optimization
from models.pretrain.learning_rate import dense_lr_scale

transformers = pytest.importorskip("transformers")

tokenizers = pytest.importorskip("tokenizers")
TEXT = "the quick brown fox jumps over the lazy dog and runs away from it\n" * 200


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def job(monkeypatch, capsys):
    def run(*arguments) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["finetune", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> tuple[Path, Path]:
    """Write a model with its tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("given")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    vocabulary = {chr(code): code for code in range(128)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    return folder / "model", folder / "text.txt"


def settings(given: tuple[Path, Path], out: Path, **changed: object) -> list[str]:
    model, text = given
    chosen = {"model": model, "text": text, "out": out, "rank": 4, "steps": 20, "seq-len": 16, "batch-size": 4}
    chosen |= {
        "lr": 1e-2,
        "warmup": 2,
        "eval-every": 10,
        "eval-batches": 2,
        "save-every": 10,
        "interval": 10,
        **changed,
    }
    return [str(part) for name, value in chosen.items() for part in (f"--{name}", value)]


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
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    outcome = job(*settings(given, tmp_path / "run", model=tmp_path / "model", tokenizer=given[0]))
    assert outcome.code == 2
    assert "`model` must hold a causal language model" in outcome.err


def test_what_is_trained_beside_factors_has_their_rate_unless_told():
    assert dense_lr_scale(Config(optimization=Optimization(optimizer="muon"))) == 1
    rates = Optimization(optimizer="muon", lr=1e-3, dense_lr=2e-3)
    assert dense_lr_scale(Config(optimization=rates)) == 2
