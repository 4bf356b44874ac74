"""The loss of a trained model on a text, by the command line."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from models import corpus
from models.evaluate.__main__ import main
from models.pretrain.__main__ import main as pretrain
from models.trained import open_trained
from tests.support.command import outcome_of
from tests.support.finetune import SIZES, save_given
from tests.support.pretrain import SMALL


def evaluation(*arguments: object) -> dict:
    outcome = outcome_of(main, *arguments, "--json", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


@pytest.fixture(scope="session")
def validation(lines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with the validation text of a run on `lines`."""
    file = tmp_path_factory.mktemp("validation") / "validation.txt"
    (document,) = corpus.split(corpus.text_files([lines])).validation
    file.write_text(document.text)
    return file


def test_the_validation_loss_is_that_of_the_run(run: Path, validation: Path):
    summary = json.loads((run / "summary.json").read_text())
    for path in (run, run / "checkpoints" / "step-00000020"):
        found = evaluation(path, "--text", validation)
        assert found["nats_per_token"] == pytest.approx(summary["validation_loss"], abs=1e-5)
    assert found["bits_per_byte"] == pytest.approx(found["nats_per_token"] / math.log(2))
    assert found["perplexity"] == pytest.approx(math.exp(found["nats_per_token"]))
    assert found["tokens"] == found["bytes"] == len(validation.read_bytes())
    assert evaluation(path) == found  # by default it is the validation text of the run


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "full"],
        ["--method", "lora", "--base-dtype", "int8"],
        ["--base-dtype", "nf4", "--residual", "none", "--moments", "8bit"],
        ["--base-dtype", "bfloat16", "--compute-dtype", "bfloat16"],
        ["--candidates", "pool"],
        ["--trained", "both"],
    ],
    ids=lambda options: "-".join(options[1::2]),
)
def test_a_checkpoint_of_every_kind_has_the_loss_of_its_run(lines, validation, tmp_path, options):
    folder = tmp_path / "run"
    assert outcome_of(pretrain, *SMALL, "--text", lines, "--out", folder, "--steps", 4, *options).code == 0
    summary = json.loads((folder / "summary.json").read_text())
    # Weights are dense here, and factors in the run: in bfloat16 their products are rounded in other places.
    tolerance = 2e-3 if "--compute-dtype" in options else 1e-5
    for path in (folder, folder / "checkpoints" / "step-00000004"):
        loss = evaluation(path, "--text", validation)["nats_per_token"]
        assert loss == pytest.approx(summary["validation_loss"], abs=tolerance)


def test_every_token_is_predicted_once(run: Path, tmp_path: Path):
    model = open_trained(run, torch.device("cpu")).model
    for length in (2, 32, 33, 34, 64, 65, 150):
        (tmp_path / "text.txt").write_text(("7 times 8 is 56\n" * 10)[:length])
        found = evaluation(run, "--text", tmp_path / "text.txt", "--every-token")
        tokens = torch.tensor(list((tmp_path / "text.txt").read_bytes()))
        losses = []
        for start in range(0, length - 1, 32):
            window = tokens[start : start + 33]
            losses.append(cross_entropy(model(window[None, :-1])[0], window[1:], reduction="none"))
        assert found["predicted"] == length - 1
        assert found["nats_per_token"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)


def test_a_text_of_another_alphabet_and_several_files(run: Path, tmp_path: Path):
    (tmp_path / "one.txt").write_text("été " * 20)
    (tmp_path / "two.txt").write_text("äöü\n" * 20)
    found = evaluation(run, "--text", tmp_path, "--every-token")
    assert (found["bytes"], found["tokens"]) == (260, 261)  # a byte separates the files


def test_a_record_without_the_option_is_of_a_run_that_trained_both_sides(run, validation, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    options = json.loads((folder / "config.json").read_text())
    assert options.pop("trained") == "both"
    (folder / "config.json").write_text(json.dumps(options))
    for place in ("", "checkpoints/step-00000020"):
        found, wanted = (evaluation(path / place, "--text", validation) for path in (folder, run))
        assert found["nats_per_token"] == wanted["nats_per_token"]


def test_a_model_folder_has_the_same_loss(run: Path, validation: Path):
    found, wanted = (evaluation(path, "--text", validation, "--every-token") for path in (run / "model", run))
    assert found["tokens"] == wanted["tokens"] + 1  # the tokenizer ends the document
    assert found["nats_per_token"] == pytest.approx(wanted["nats_per_token"], rel=0.01)
    assert found["bits_per_byte"] == pytest.approx(wanted["bits_per_byte"], rel=0.01)


def test_lines_for_people(run: Path, validation: Path):
    outcome = outcome_of(main, run, "--text", validation, "--device", "cpu")
    assert [line.split("  ")[0] for line in outcome.out.splitlines()[1:]] == [
        "nats per token",
        "bits per byte",
        "perplexity",
    ]


def test_bad_input_is_one_line(run: Path, tmp_path: Path):
    (tmp_path / "short.txt").write_text("a")
    (tmp_path / "empty.txt").write_text("")
    for arguments, message in (
        ([run, "--text", tmp_path / "none"], "which does not exist"),
        ([run, "--text", tmp_path / "empty.txt"], "`text` must contain some text"),
        ([run, "--text", tmp_path / "short.txt"], "`text` must have at least 2 tokens, got 1"),
        ([tmp_path, "--text", tmp_path / "short.txt"], "which has no config.json"),
        ([run / "model"], "`text` must be given for a model without the tokens of a run, got none"),
    ):
        outcome = outcome_of(main, *arguments, "--device", "cpu")
        assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
        assert message in outcome.err


def test_a_model_that_sees_later_tokens_is_refused(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    model = transformers.BertLMHeadModel(transformers.BertConfig(vocab_size=128, **SIZES))
    given = save_given(model, tmp_path)
    outcome = outcome_of(main, given.model, "--text", given.text, "--device", "cpu")
    assert outcome.code == 2
    assert "`model` must predict each token from those before it, got one whose logits change" in outcome.err
