"""Text from a trained model, by the command line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from models.evaluate.__main__ import main as evaluate
from models.generate.__main__ import main
from tests.support.command import outcome_of
from tests.support.pretrain import Outcome

GREEDY = ("--temperature", 0)


def generate(*arguments: object) -> Outcome:
    return outcome_of(main, *arguments, "--device", "cpu")


def text_of(*arguments: object) -> str:
    outcome = generate(*arguments)
    assert outcome.code == 0, outcome.err
    return outcome.out


def test_a_seed_reproduces_a_text(run: Path):
    arguments = (run, "--prompt", "3 times", "--tokens", 30)
    first = text_of(*arguments, "--seed", 1)
    assert first.startswith("3 times")
    assert len(first) > len("3 times\n")
    assert text_of(*arguments, "--seed", 1) == first
    assert text_of(*arguments, "--seed", 2) != first


def test_the_smallest_top_p_and_temperature_0_are_greedy(run: Path):
    arguments = (run, "--prompt", "3 times", "--tokens", 20)
    greedy = text_of(*arguments, *GREEDY)
    assert text_of(*arguments, *GREEDY, "--seed", 5) == greedy
    assert text_of(*arguments, "--top-p", 0, "--seed", 5) == greedy
    assert text_of(*arguments, "--temperature", 1e-300) == greedy
    assert text_of(*arguments, "--top-p", 1, "--temperature", 5) != greedy


def test_transformers_continues_in_the_same_way(run: Path):
    """The cache, the exported model and the exported tokenizer agree."""
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    tokens = tokenizer("3 times", return_tensors="pt")
    model = LlamaForCausalLM.from_pretrained(run / "model").eval()
    wanted = model.generate(**tokens, max_new_tokens=20, do_sample=False, pad_token_id=0)[0]
    assert text_of(run, "--prompt", "3 times", "--tokens", 20, *GREEDY) == tokenizer.decode(wanted) + "\n"


def test_a_model_folder_and_the_last_checkpoint_are_the_run(run: Path):
    arguments = ("--prompt", "3 times", "--tokens", 20, *GREEDY)
    wanted = text_of(run, *arguments)
    for path in (run / "model", run / "checkpoints" / "step-00000020"):
        assert text_of(path, *arguments) == wanted


def test_a_run_that_has_not_ended_means_its_newest_checkpoint(run: Path, tmp_path: Path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("model*", "step-00000020"))
    shutil.copytree(run / "checkpoints" / "step-00000010", tmp_path / "run" / "checkpoints" / "step-best")
    arguments = ("--prompt", "3 times", "--tokens", 20, *GREEDY)
    wanted = text_of(run / "checkpoints" / "step-00000010", *arguments)
    assert text_of(tmp_path / "run", *arguments) == wanted
    assert text_of(tmp_path / "run" / "checkpoints" / "step-best", *arguments) == wanted


def test_an_empty_prompt_begins_a_document(run: Path):
    text = text_of(run, "--tokens", 5, "--seed", 3)
    assert "\0" not in text


def test_a_prompt_longer_than_a_sequence_is_seen_from_its_end(run: Path):
    end = "4 times 5 is 20; 4 times 6 is 24"  # the 32 tokens of a sequence
    long = generate(run, "--prompt", "x" * 50 + end, "--tokens", 40, *GREEDY)
    assert long.code == 0
    assert "the prompt has 82 tokens; the model sees the last 32" in long.err
    assert long.out == "x" * 50 + text_of(run, "--prompt", end, "--tokens", 40, *GREEDY)


def test_bytes_that_are_no_text_are_replaced(run: Path):
    assert text_of(run, "--prompt", "a\udcff", "--tokens", 1, *GREEDY).startswith("a\ufffd")


def test_a_fine_tuned_run_is_read_in_every_form(run: Path, lines: Path, tmp_path: Path):
    from models.finetune.__main__ import main as finetune  # noqa: PLC0415

    folder = tmp_path / "tuned"
    sizes = ["--rank", 4, "--steps", 4, "--seq-len", 16, "--batch-size", 2, "--eval-batches", 1, "--warmup", 1]
    arguments = ["--model", run / "model", "--text", lines, "--out", folder, "--lr", 0.01, "--export", "merged", *sizes]
    outcome = outcome_of(finetune, *arguments, "--device", "cpu")
    assert outcome.code == 0, outcome.err
    arguments = ("--prompt", "3 times", "--tokens", 20, *GREEDY)
    wanted = text_of(folder, *arguments)
    assert wanted != text_of(run, *arguments)
    assert text_of(folder / "checkpoints" / "step-00000004", *arguments) == wanted
    shutil.rmtree(folder / "model")
    assert text_of(folder, *arguments) == wanted


def test_a_run_with_a_tokenizer_finds_it_in_its_folder(run: Path, lines: Path, tmp_path: Path):
    from models.pretrain.__main__ import main as pretrain  # noqa: PLC0415
    from tests.support.pretrain import SMALL  # noqa: PLC0415

    shutil.copytree(run / "model", tmp_path / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
    arguments = ["--text", lines, "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "run", "--steps", 2]
    outcome = outcome_of(pretrain, *SMALL, *arguments)
    assert outcome.code == 0, outcome.err
    shutil.rmtree(tmp_path / "tokenizer")
    assert text_of(tmp_path / "run", "--prompt", "é", "--tokens", 3).startswith("é")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--tokens", 0], "`tokens` must be at least 1, got 0"),
        (["--temperature", -1], "`temperature` must be 0 or more and finite, got -1.0"),
        (["--temperature", "nan"], "`temperature` must be 0 or more and finite, got nan"),
        (["--temperature", "inf"], "`temperature` must be 0 or more and finite, got inf"),
        (["--top-p", 1.5], "`top_p` must be between 0 and 1, got 1.5"),
        (["--top-p", "nan"], "`top_p` must be between 0 and 1, got nan"),
        (["--seed", -1], "`seed` must be between 0 and 2**63 - 1, got -1"),
        (["--seed", 2**63], f"`seed` must be between 0 and 2**63 - 1, got {2**63}"),
    ],
)
def test_bad_options_are_one_line(run: Path, changed: list, message: str):
    outcome = generate(run, *changed)
    assert (outcome.code, outcome.out, outcome.err) == (2, "", f"error: {message}\n")


def test_a_folder_that_is_no_run_is_named(run: Path, tmp_path: Path):
    def error(path: Path) -> str:
        outcome = generate(path)
        assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
        return outcome.err

    assert f"`run` is {str(tmp_path / 'none')!r}, which has no config.json" in error(tmp_path / "none")
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("model*", "step-*"))
    assert "which has neither a final model nor a checkpoint" in error(tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:-100])
    assert "`run` has a damaged file" in error(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text("[]")
    assert "is neither of a run nor of a model" in error(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text("{")
    assert "has no valid JSON" in error(tmp_path / "run")


def test_a_damaged_checkpoint_is_named(run: Path, tmp_path: Path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("model*"))
    (state,) = (tmp_path / "run" / "checkpoints" / "step-00000020").glob("*.safetensors")
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    outcome = generate(tmp_path / "run")
    assert outcome.code == 2
    assert "`run` has a damaged checkpoint" in outcome.err


def test_a_checkpoint_of_another_run_is_refused(run: Path, tmp_path: Path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("model*"))
    options = json.loads((run / "config.json").read_text())
    for changed, message in (({"seed": 1}, "the setting seed 0 instead of 1"), ({"model": "llama-9m"}, "the setting")):
        (tmp_path / "run" / "config.json").write_text(json.dumps(options | changed))
        outcome = generate(tmp_path / "run")
        assert outcome.code == 2
        assert message in outcome.err


def test_the_logits_of_a_checkpoint_are_those_of_the_model(run: Path):
    from models.trained import open_trained  # noqa: PLC0415

    paths = (run, run / "checkpoints" / "step-00000020")
    final, restored = (open_trained(path, torch.device("cpu")).model for path in paths)
    assert all(torch.equal(a, b) for a, b in zip(final.parameters(), restored.parameters(), strict=True))


def test_a_checkpoint_of_a_run_on_another_device_is_read(run: Path, tmp_path: Path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("model*"))
    options = json.loads((run / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(options | {"device": "cuda:9"}))
    arguments = ("--prompt", "3 times", "--tokens", 10, *GREEDY)
    assert text_of(tmp_path / "run", *arguments) == text_of(run / "checkpoints" / "step-00000020", *arguments)


def test_a_run_that_goes_on_with_more_steps_means_its_newest_checkpoint(run: Path, lines: Path, tmp_path: Path):
    from models.pretrain.__main__ import main as pretrain  # noqa: PLC0415
    from tests.support.pretrain import SMALL  # noqa: PLC0415

    longer = tmp_path / "run"
    shutil.copytree(run, longer)
    options = ["--text", lines, "--out", longer, "--resume", "--steps", 22, "--save-every", 1, "--lr", 0.05]
    outcome = outcome_of(pretrain, *SMALL, *options)
    assert outcome.code == 2  # another rate
    outcome = outcome_of(pretrain, *SMALL, *options[:-2])
    assert outcome.code == 0, outcome.err
    arguments = ("--prompt", "3 times", "--tokens", 20, *GREEDY)
    ended = text_of(longer, *arguments)
    assert ended == text_of(longer / "checkpoints" / "step-00000022", *arguments)
    shutil.rmtree(longer / "checkpoints" / "step-00000022")  # as if it had been killed before
    for name in ("summary.json", "model.safetensors"):
        shutil.copy(run / name, longer / name)
    wanted = text_of(longer / "checkpoints" / "step-00000021", *arguments)
    assert text_of(longer, *arguments) == wanted
    assert wanted != text_of(run, *arguments) or wanted == ended


def test_a_token_that_the_model_does_not_embed_is_named(run: Path, lines: Path, tmp_path: Path):
    shutil.copytree(run / "model", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_tokens(["times"])
    tokenizer.save_pretrained(tmp_path / "model")
    assert generate(tmp_path / "model", "--prompt", "3", "--tokens", 1).code == 0
    message = "`run` must embed the tokens of its tokenizer, got the token 256 for a model that embeds 256; "
    for outcome in (
        generate(tmp_path / "model", "--prompt", "3 times"),
        outcome_of(evaluate, tmp_path / "model", "--text", lines, "--device", "cpu"),
    ):
        assert outcome.code == 2
        assert message in outcome.err
        assert outcome.err.count("\n") == 1


def test_options_that_are_nested_too_deep_are_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    outcome = generate(tmp_path)
    assert outcome.code == 2
    assert "`run` has no valid JSON in" in outcome.err
