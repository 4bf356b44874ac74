"""The main job from the command line: what it writes, how it resumes, and what it says of bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from damage import damage_by_a_bit, damage_by_truncation
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from models.llama import Llama, config
from models.pretrain.__main__ import main

ROOT = Path(__file__).parent.parent
MODEL = ["--model", "llama-tiny", "--rank", "8", "--batch-size", "2", "--seq-len", "32"]
SMALL = [*MODEL, "--eval-batches", "2", "--warmup", "4", "--interval", "10", "--ratio", "1"]


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Job = Callable[..., Outcome]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text("".join(f"{number} times {k} is {number * k}\n" for k in range(60)))
    return folder


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: Path) -> Job:
    """Runs the command in this process."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["pretrain", *SMALL, "--text", str(text), *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Outcome(code, *capsys.readouterr())

    return run


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


METHODS = [
    ["--method", "full"],
    ["--method", "lora"],
    ["--method", "relora", "--merge-every", "10"],
    ["--method", "switchlora"],
    ["--method", "switchlora", "--candidates", "pool"],
    ["--method", "switchlora", "--compensate", "0.1"],
    ["--method", "switchlora", "--optimizer", "adamw"],
    ["--method", "full", "--optimizer", "muon", "--dense-lr", "0.02"],
    ["--method", "lora", "--compensate", "0.1", "--base-dtype", "int8"],
    ["--method", "switchlora", "--base-dtype", "bfloat16", "--compute-dtype", "bfloat16"],
    ["--method", "switchlora", "--grad-accum", "2"],
    ["--method", "switchlora", "--base-dtype", "int8", "--moments", "8bit"],
    ["--method", "switchlora", "--base-dtype", "nf4", "--residual", "none"],
    ["--method", "relora", "--merge-every", "10", "--base-dtype", "float8", "--residual", "int8"],
]


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
    # Two moments, and a count and a freeze counter for each vector, a count alone for each full-rank tensor.
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


@pytest.mark.parametrize("options", [[], ["--compensate", "0.1"]], ids=["plain", "compensated"])
def test_compiled_equals_eager(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]):
    """With the tracing of `torch.compile` but not its slow code generation, and few weights that are low-rank."""
    options = [*options, "--steps", "12", "--targets", "*.query.weight", "*.down.weight"]
    assert job("--out", tmp_path / "eager", *options).code == 0
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    assert job("--out", tmp_path / "compiled", "--compile", *options).code == 0
    eager, compiled = metrics(tmp_path / "eager"), metrics(tmp_path / "compiled")
    assert sum(line["switched"] for line in eager) > 0
    torch.testing.assert_close([line["loss"] for line in compiled], [line["loss"] for line in eager])


def start(arguments: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "models.pretrain", *SMALL, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.parametrize(
    "options", ["--candidates seeded", "--candidates pool", "--base-dtype int8 --residual int8 --moments 8bit"]
)
def test_killed_run_continues_bit_for_bit(tmp_path: Path, text: Path, options: str):
    arguments = [
        "--text",
        str(text),
        "--steps",
        "60",
        "--save-every",
        "10",
        "--eval-every",
        "20",
        *options.split(),
    ]
    whole = start([*arguments, "--out", str(tmp_path / "whole")])
    killed = start([*arguments, "--out", str(tmp_path / "killed")])
    lines = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (lines.exists() and lines.read_bytes().count(b"\n") >= 25) and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert len(metrics(tmp_path / "killed")) < 60, "the run ended before it was killed"
    resumed = start([*arguments, "--out", str(tmp_path / "killed"), "--resume"])
    output, _ = resumed.communicate()
    assert resumed.returncode == 0, output
    assert "continuing after step 0" not in output
    assert whole.wait() == 0
    for name in ("metrics.jsonl", "model.safetensors", "checkpoints/step-00000060/state.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [damage_by_truncation, damage_by_a_bit, remove])
def test_damaged_checkpoint_is_refused_and_the_older_one_used(job: Job, tmp_path: Path, damage: Callable[[Path], None]):
    arguments = ["--out", tmp_path / "run", "--steps", 20, "--save-every", 10]
    job(*arguments)
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    damage(tmp_path / "run" / "checkpoints" / "step-00000020" / "state.safetensors")
    outcome = job(*arguments, "--resume")
    assert outcome.code == 0, outcome.err
    assert "refused a damaged checkpoint" in outcome.out
    assert "step-00000020" in outcome.out
    assert "continuing after step 10" in outcome.out
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_damaged_checkpoints_only(job: Job, tmp_path: Path):
    arguments = ["--out", tmp_path / "run", "--steps", 20, "--save-every", 10]
    job(*arguments)
    for path in (tmp_path / "run").rglob("state.safetensors"):
        damage_by_a_bit(path)
    before = contents(tmp_path / "run")
    outcome = job(*arguments, "--resume")
    assert outcome.code == 2
    assert "step-00000010" in outcome.err
    assert "step-00000020" in outcome.err
    assert contents(tmp_path / "run") == before


BAD_INPUT = {
    "rank": (["--rank", "33"], "`rank` must be at least 1 and at most min(out, in) = 32 for 'layers."),
    "targets": (["--targets", "blocks.*"], "`targets` contains 'blocks.*', which matches no name"),
    "device": (["--device", "cuda:9"], "`device` must be one that this machine has, got 'cuda:9'"),
    "no such device": (["--device", "toaster"], "`device` must be one that this machine has, got 'toaster'"),
    "model": (["--model", "llama-2m"], "`model` must be one of"),
    "steps": (["--steps", "0"], "`steps` must be at least 1, got 0"),
    "lr": (["--lr", "nan"], "`lr` must be positive and finite, got nan"),
    "interval": (["--interval", "9"], "`interval` must be at least 10"),
    "short text": (["--seq-len", "4000"], "the text must give at least 4001 tokens for"),
    "no text": (["--text", "nowhere"], "`text` must name files or folders, got 'nowhere'"),
    "pool": (["--candidates", "pool", "--method", "lora"], "`candidates` must be 'seeded' except for switchlora"),
    "compensate": (["--compensate", "0.1", "--method", "full"], "`compensate` must be 0 for full"),
    "resume": (["--out", "nowhere", "--resume"], "`out` must hold a run to resume, got 'nowhere'"),
    "both": (["--dataset", "c4"], "`text` and `dataset` must not both be given"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_and_writes_nothing(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    arguments, message = BAD_INPUT[name]
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    outcome = job(*arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert "Traceback" not in outcome.err
    assert contents(tmp_path) == before


def test_unknown_option(job: Job):
    outcome = job("--method", "sorcery")
    assert outcome.code == 2
    assert "sorcery" in outcome.err + outcome.out


def test_folder_of_another_run_is_left_alone(job: Job, tmp_path: Path):
    job("--out", tmp_path / "run", "--steps", 2)
    before = contents(tmp_path / "run")
    outcome = job("--out", tmp_path / "run", "--steps", 2)
    assert outcome.code == 2
    assert "`out` must be new or empty, or come with --resume" in outcome.err
    assert contents(tmp_path / "run") == before


def test_resume_with_another_configuration_says_in_what(job: Job, tmp_path: Path, text: Path):
    job("--out", tmp_path / "run", "--steps", 2)
    before = contents(tmp_path / "run")
    outcome = job("--out", tmp_path / "run", "--steps", 3, "--lr", 0.5, "--resume")
    assert outcome.code == 2
    assert "lr was None and is 0.5; steps was 2 and is 3" in outcome.err
    (text / "0.txt").write_text("something else altogether\n" * 50)
    assert "corpus was" in job("--out", tmp_path / "run", "--steps", 2, "--resume").err
    assert contents(tmp_path / "run") == before


def test_divergence_stops_and_keeps_the_last_good_checkpoint(job: Job, tmp_path: Path):
    out = tmp_path / "run"
    high = ["--optimizer", "adamw", "--lr", "1e18", "--warmup", "40"]
    outcome = job("--out", out, "--steps", 60, "--save-every", 1, *high)
    assert outcome.code == 2
    assert "must be finite to go on, got" in outcome.err
    assert "Traceback" not in outcome.err
    saved = sorted((out / "checkpoints").glob("step-*/state.safetensors"))
    assert saved
    assert all(tensor.isfinite().all() for tensor in load_file(saved[-1]).values())
    assert all(line["loss"] < float("inf") for line in metrics(out))


def test_plain_lines_where_there_is_no_terminal(job: Job, tmp_path: Path):
    outcome = job("--out", tmp_path / "run", "--steps", 20, "--eval-every", 10)
    lines = [line for line in outcome.out.splitlines() if line.startswith("step ")]
    assert len(lines) == 2
    assert "\x1b" not in outcome.out


def test_dataset_with_a_tokenizer(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "dataset"
    folder.mkdir()
    texts = [f"{number} times {k} is {number * k}" for number in range(30) for k in range(30)]
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
