"""What a run leaves for `transformers`, and the samples that it prints."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from models.codec import byte_codec
from models.pretrain.__main__ import main
from models.trained import open_trained
from tests.support.command import outcome_of
from tests.support.pretrain import SMALL

TEXTS = [
    "3 times 4 is 12\n",
    "  two  spaces,\ttabs\r\nand lines\n\n",
    "Āāé ß 漢字 🙂 \u200b\u00a0\u0301",
    "<s></s><|endoftext|> [CLS]",
    "\x01\x7f\x80\xff",
    "",
]


@pytest.mark.parametrize("kind", [LlamaForCausalLM, AutoModelForCausalLM])
def test_from_pretrained_has_the_logits_of_the_run(run: Path, kind: type):
    exported, loading = kind.from_pretrained(run / "model", output_loading_info=True)
    assert not any(loading[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model = open_trained(run, torch.device("cpu")).model
    tokens = torch.arange(64).reshape(2, 32) * 3
    with torch.no_grad():
        torch.testing.assert_close(exported.eval()(tokens).logits, model(tokens), rtol=0, atol=1e-5)
    assert exported.dtype == torch.float32
    assert (exported.config.max_position_embeddings, exported.config.eos_token_id) == (32, 0)


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_the_bytes_of_the_text(run: Path, text: str):
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    tokens = list(text.encode())
    assert tokenizer(text)["input_ids"] == byte_codec().encode(text) == tokens
    assert tokenizer.decode(tokens) == byte_codec().decode(tokens) == text
    assert len(tokenizer) == 256


def test_the_zero_byte_ends_a_document(run: Path):
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("\0", byte_codec().end)
    assert tokenizer("a\0b")["input_ids"] == [97, 0, 98]
    assert tokenizer.decode([97, 0, 98], skip_special_tokens=True) == byte_codec().decode([97, 0, 98]) == "ab"


@pytest.mark.parametrize("tokens", [[255], [195], [240, 159], [97, 195, 40, 98], [128, 129]])
def test_bytes_that_are_no_text_are_replaced(run: Path, tokens: list[int]):
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert tokenizer.decode(tokens) == byte_codec().decode(tokens) == bytes(tokens).decode("utf-8", "replace")


def test_samples_are_lines_of_the_log(run: Path):
    samples = [line for line in (run / "log.txt").read_text().splitlines() if " is continued by " in line]
    assert [line.split(":")[0] for line in samples] == ["step 10", "step 20"]


def test_samples_do_not_change_the_run(run: Path, lines: Path, tmp_path: Path):
    steps = ["--steps", 20, "--save-every", 10, "--lr", 0.01, "--trained", "both"]
    outcome = outcome_of(main, *SMALL, "--text", lines, "--out", tmp_path / "run", *steps)
    assert " is continued by " not in outcome.out
    for name in ("metrics.jsonl", "model.safetensors", "model/config.json", "model/tokenizer.json"):
        assert (run / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


@pytest.mark.parametrize("options", [["--base-dtype", "int8"], ["--compute-dtype", "bfloat16"], ["--method", "full"]])
def test_every_kind_of_weights_can_be_sampled(lines: Path, tmp_path: Path, options: list[str]):
    arguments = ["--text", lines, "--out", tmp_path / "run", "--steps", 2, "--sample-every", 2, *options]
    outcome = outcome_of(main, *SMALL, *arguments)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count(" is continued by ") == 1


def test_sample_every_must_not_be_negative(lines: Path, tmp_path: Path):
    outcome = outcome_of(main, *SMALL, "--text", lines, "--out", tmp_path / "run", "--sample-every", -1)
    assert (outcome.code, outcome.err) == (2, "error: `sample_every` must not be negative, got -1\n")
