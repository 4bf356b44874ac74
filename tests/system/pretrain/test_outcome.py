"""The main job from the command line: what each method trains, writes and prints."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from dynlora_fn.nn import _value_and_grad
from models.llama import Llama, config
from models.pretrain.__main__ import main
from tests.support.pretrain import SMALL, Job, metrics

METHODS = [
    ["--method", "full"],
    ["--method", "lora"],
    ["--method", "relora", "--merge-every", "10"],
    ["--method", "switchlora"],
    ["--method", "switchlora", "--candidates", "pool"],
    ["--method", "switchlora", "--compensate", "0.1"],
    ["--method", "switchlora", "--optimizer", "adamw"],
    ["--method", "switchlora", "--trained", "b"],
    ["--method", "full", "--optimizer", "muon", "--dense-lr", "0.02"],
    ["--method", "lora", "--compensate", "0.1", "--base-dtype", "int8"],
    ["--method", "switchlora", "--base-dtype", "bfloat16", "--compute-dtype", "bfloat16"],
    ["--method", "switchlora", "--grad-accum", "2"],
    ["--method", "switchlora", "--base-dtype", "int8", "--moments", "8bit"],
    ["--method", "switchlora", "--base-dtype", "nf4", "--residual", "none"],
    ["--method", "relora", "--merge-every", "10", "--base-dtype", "float8", "--residual", "int8"],
]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=lambda method: "-".join(method[1::2]))
def test_every_method_trains_and_exports(job: Job, tmp_path: Path, method: list[str]):
    out = tmp_path / "run"
    outcome = job("--out", out, "--steps", 40, "--eval-every", 20, "--lr", 0.01, "--json", *method)
    assert outcome.code == 0, outcome.err
    summary = json.loads(outcome.out.splitlines()[-1])
    lines = metrics(out)
    assert [line["step"] for line in lines] == list(range(1, 41))
    validation = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert summary["validation_loss"] == validation[-1]
    assert validation[-1] < min(validation[0], torch.log(torch.tensor(256.0)).item())
    is_switching = method[1] in ("relora", "switchlora")
    assert (sum(line["switched"] for line in lines) > 0) == is_switching
    assert (summary["bytes"]["candidates"] > 0) == ("pool" in method)
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_merged_model_loads_into_plain_torch(job: Job, tmp_path: Path):
    out = tmp_path / "run"
    outcome = job("--out", out, "--steps", 12, "--json")
    model = Llama(config("llama-tiny", vocabulary=256))
    model.load_state_dict(load_file(out / "model.safetensors"))
    # Its validation loss is the one that was reported.
    summary = json.loads(outcome.out.splitlines()[-1])
    from models import corpus  # noqa: PLC0415

    documents = corpus.split(corpus.text_files([tmp_path / "text"]))
    tokens = corpus.tokenize(documents, corpus.byte_tokenizer(), window=33).validation
    losses = []
    for windows in corpus.validation_batches(tokens, 2, 2, window=33):
        logits = model(windows[:, :-1])
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))
    assert torch.stack(losses).mean().item() == pytest.approx(summary["validation_loss"], rel=1e-5)


def test_closing_table_counts_bytes(job: Job, tmp_path: Path):
    arguments = ["--out", tmp_path / "run", "--steps", 2, "--optimizer", "adamw", "--json"]
    summary = json.loads(job(*arguments).out.splitlines()[-1])
    width, hidden, layers, rank, vocabulary = 32, 88, 2, 8, 256
    sides = 4 * [(width, width)] + 3 * [(width, hidden)]
    factors = layers * rank * sum(map(sum, sides))
    full_rank = 2 * vocabulary * width + (2 * layers + 1) * width
    base = layers * sum(left * right for left, right in sides)
    assert summary["bytes"]["base"] == 4 * base
    assert summary["bytes"]["factors"] == 4 * factors
    assert summary["bytes"]["gradients"] == summary["reduced_bytes_per_step"] == 4 * (factors + full_rank)
    assert summary["full_rank_reduced_bytes_per_step"] == 4 * (base + full_rank)
    # Two moments, and a count and a freeze counter for each vector, only a count for each full-rank tensor.
    vectors = layers * len(sides) * 2 * rank
    assert summary["bytes"]["optimizer"] == 8 * (factors + full_rank) + 8 * vectors + 4 * 5


@pytest.mark.parametrize(
    ("base", "residual", "bytes_each"),
    [("int8", "bfloat16", (1, 2)), ("int8", "int8", (1, 1)), ("nf4", "none", (0.52, 0)), ("bfloat16", "int8", (2, 1))],
)
def test_closing_table_counts_the_bytes_of_codes_and_residuals(job, tmp_path, base, residual, bytes_each):
    outcome = job("--out", tmp_path / "run", "--steps", 2, "--json", "--base-dtype", base, "--residual", residual)
    summary = json.loads(outcome.out.splitlines()[-1])
    numbers = 2 * (4 * 32 * 32 + 3 * 32 * 88)
    # A scale of four bytes for each of 32 or more numbers; nf4's and its factor's for each of 64 and more.
    for name, least in zip(("base", "residual"), bytes_each, strict=True):
        assert least * numbers <= summary["bytes"][name] <= (least + 4 / 32) * numbers * (least > 0)
    assert (summary["drift"] is None) == (residual == "none")
    assert ("drift" in metrics(tmp_path / "run")[-1]) == (residual != "none")
    if residual != "none":
        # A step is 1/127 of a row's largest number, and rows of the bases are several times as large as the weights'.
        assert 0 < summary["drift"] < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--compensate", "0.1"]], ids=["plain", "compensated"])
def test_compiled_equals_eager(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]):
    """The run uses the tracing of `torch.compile` without its slow code generation, and few low-rank weights.

    torch has two formulas for the gradient of silu, which differ by rounding. `torch.func` takes one in both runs.
    """
    monkeypatch.setattr(_value_and_grad, "_needs_func", lambda *_: True)
    options = [*options, "--steps", "12", "--targets", "*.query.weight", "*.down.weight"]
    assert job("--out", tmp_path / "eager", *options).code == 0
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    assert job("--out", tmp_path / "compiled", "--compile", *options).code == 0
    eager, compiled = metrics(tmp_path / "eager"), metrics(tmp_path / "compiled")
    assert sum(line["switched"] for line in eager) > 0
    torch.testing.assert_close([line["loss"] for line in compiled], [line["loss"] for line in eager])


def test_plain_lines_where_there_is_no_terminal(job: Job, tmp_path: Path):
    outcome = job("--out", tmp_path / "run", "--steps", 20, "--eval-every", 10)
    lines = [line for line in outcome.out.splitlines() if line.startswith("step ")]
    assert len(lines) == 2
    assert "\x1b" not in outcome.out


@pytest.mark.slow
def test_dataset_with_a_tokenizer(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "dataset"
    folder.mkdir()
    texts = [f"{factor} times {k} is {factor * k}" for factor in range(30) for k in range(30)]
    (folder / "train.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=80, special_tokens=["<unk>"]))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    arguments = ["--dataset", folder, "--text-column", "body", "--tokenizer", tmp_path / "tokenizer.json"]
    monkeypatch.setattr(
        sys, "argv", ["pretrain", *SMALL, "--steps", "6", "--out", str(tmp_path / "run"), *map(str, arguments)]
    )
    main()
    embedding = load_file(tmp_path / "run" / "model.safetensors")["embedding.weight"]
    assert embedding.shape == (tokenizer.get_vocab_size(), 32)
