"""Options from files, and what of them a resumed run may change."""

import json
import os
import re
from pathlib import Path

import pytest

from models.finetune.config import Config as FinetuneConfig
from models.pretrain.config import Config
from models.pretrain.settings import parse, read_options, with_options
from tests.support.pretrain import Job, contents


def written(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def test_a_file_gives_defaults_and_the_command_line_comes_first(tmp_path: Path):
    options = {"steps": 7, "lr": 1, "text": ["a", "b"], "optimization": {"warmup": 3}, "targets": ["x"], "corpus": "0"}
    file = written(tmp_path / "options.json", json.dumps(options))
    config = parse(Config, "pretrain", ["--config", str(file), "--warmup", "9"])
    assert (config.training.steps, config.optimization.lr, config.optimization.warmup) == (7, 1, 9)
    assert (config.data.text, config.training.targets) == ((Path("a"), Path("b")), ("x",))
    toml = 'seed = 3\n[data]\ntext = ["a"]\n[training]\nrank = 4\n[machine]\nshard = true\n'
    config = parse(Config, "pretrain", ["--config", str(written(tmp_path / "options.toml", toml)), "--no-shard"])
    assert (config.training.rank, config.training.seed, config.data.text) == (4, 3, (Path("a"),))
    assert not config.machine.shard


def test_the_record_of_a_run_gives_the_same_options(tmp_path: Path):
    arguments = "--steps 9 --text a b --lr 0.1 --candidates pool --grad-accum 2 --targets x y --residual-device cpu"
    config = parse(Config, "pretrain", arguments.split())
    path = written(tmp_path / "config.json", json.dumps(config.options() | {"corpus": "abc"}, default=str))
    assert parse(Config, "pretrain", ["--config", str(path)]).options() == config.options() | {"config": path}


def test_fine_tuning_reads_its_options_too(tmp_path: Path):
    file = written(tmp_path / "options.json", '{"adapter_rank": 3, "model": "folder"}')
    config = parse(FinetuneConfig, "finetune", ["--config", str(file)])
    assert (config.output.adapter_rank, config.training.model, config.optimization.warmup) == (3, "folder", 10)


BAD_FILES = {
    "unknown": ('{"stps": 3}', "`config` must have only options of this program, got 'stps' in"),
    "type": ('{"steps": "3"}', "`steps` must be of type int, got '3' in"),
    "boolean": ('{"steps": true}', "`steps` must be of type int, got True in"),
    "choice": ('{"method": "sorcery"}', r"`method` must be of type Literal['full', 'lora', 'relora', 'switchlora']"),
    "text": ('{"text": "a"}', "`text` must be of type"),
    "part of a text": ('{"text": [3]}', "`text` must be of type Path, got 3 in"),
    "no JSON": ("steps = 3", "`config` must name options in JSON or TOML, got"),
    "no object": ("[3]", "`config` must name an object of options, got [3] in"),
    "nan": ('{"lr": NaN}', "`lr` must be of type float | None, got nan in"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_of_options_that_is_wrong_is_named(tmp_path: Path, name: str):
    content, message = BAD_FILES[name]
    file = written(tmp_path / "options.json", content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        with_options(Config(), read_options(file), file)
    assert str(file) in str(caught.value)


def test_a_file_that_is_not_there_is_one_line(job: Job, tmp_path: Path):
    outcome = job("--config", tmp_path / "nowhere.json")
    assert outcome.code == 2
    assert outcome.err == f"error: No such file or directory: '{tmp_path}/nowhere.json'\n"


def test_a_resumed_run_takes_its_options_and_changes_those_that_it_may(job: Job, tmp_path: Path, text: Path):
    out = tmp_path / "run"
    assert job("--out", out, "--steps", 4, "--lr", 0.005).code == 0
    (text / "0.txt").rename(text / "6.txt")
    (text / "6.txt").rename(text / "0.txt")
    record = json.loads((out / "config.json").read_text())
    changed = {"eval_every": 2, "save_every": 3, "keep": 5, "steps": 6, "text": [str(text), str(text / "0.txt")]}
    given = [part for name, value in changed.items() for part in (f"--{name.replace('_', '-')}", value)]
    flat = [str(part) for option in given for part in (option if isinstance(option, list) else [option])]
    outcome = job("--out", out, "--resume", *flat)
    assert outcome.code == 0, outcome.err
    assert json.loads((out / "config.json").read_text()) == record | changed
    before = contents(out)
    refused = job("--out", out, "--resume", "--seed", 1)
    assert refused.code == 2
    assert "`resume` must keep the options recorded in" in refused.err
    assert "seed was 0 and is 1" in refused.err
    assert contents(out) == before


def test_a_pipe_of_options_is_refused_and_not_waited_for(job: Job, tmp_path: Path):
    os.mkfifo(tmp_path / "options")
    outcome = job("--config", tmp_path / "options")
    assert outcome.code == 2
    assert "`config` must name a file, got" in outcome.err
