"""Damaged input gives an error that names the file, no crash, nothing executed, nothing half done.

``--damaged 1250`` makes ten thousand of them.
"""

import dataclasses
import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import dynlora_fn as dl
from dynlora_fn.testing import assert_same, untouched
from models import corpus
from models.pretrain.checkpoint import Saver, load_checkpoint
from models.pretrain.config import Config, Output, Training
from models.pretrain.folder import prepare_folder
from models.pretrain.processes import SINGLE_PROCESS
from models.pretrain.progress import read_metrics
from tests.support.damage import Damage, nothing_run


class Kind(NamedTuple):
    """One kind of input: a writer of valid input, and its reader."""

    write: Callable[[Path], None]
    read: Callable[[Path], Any]
    spoils: str = "*"  # which of the files
    says: str = "$^"  # what an error may name instead of a file or folder


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))


MODEL = layers()
PARAMS = dl.init(MODEL, rank=2, seed=0, targets=["*.weight"])
STATE = {"params": dl.init(MODEL, rank=2, seed=0, targets=["*.weight"], base="int8"), "t": torch.tensor(3)}


def write_sharded(folder: Path) -> None:
    weights = {name: weight.detach() for name, weight in MODEL.state_dict().items()}
    names = sorted(weights)
    for index, part in enumerate((names[:2], names[2:])):
        dl.interop.save_weights({name: weights[name] for name in part}, folder / f"part{index}.safetensors")
    where = {name: f"part{index}.safetensors" for index, part in enumerate((names[:2], names[2:])) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def into_model(folder: Path) -> Any:
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    return dl.init(empty, weights=dl.interop.open_weights(folder), rank=2, seed=0, targets=["*.weight"])


def write_checkpoint(folder: Path) -> None:
    with Saver(folder, SINGLE_PROCESS, keep=1) as saver:
        saver.start(1, STATE)


def read_checkpoint(folder: Path) -> Any:
    loaded = load_checkpoint(folder, STATE, SINGLE_PROCESS)
    assert loaded is not None
    assert_same(loaded.state, STATE)  # what reads without an error is what was saved
    return loaded


def write_text(folder: Path) -> None:
    for index in range(2):
        (folder / f"{index}.txt").write_text("some text, äöü\n" * 20)


def read_text(folder: Path) -> Any:
    documents = corpus.text_files([folder / "0.txt", folder / "1.txt"])
    return corpus.tokenize(corpus.split(documents), corpus.byte_tokenizer(), window=2)


def write_metrics(folder: Path) -> None:
    lines = [json.dumps({"step": step, "loss": 1 / step, "eval": None}) + "\n" for step in range(1, 9)]
    (folder / "metrics.jsonl").write_text("".join(lines))


CONFIG = Config(training=Training(steps=3))
PARAMETER = r"^`weights` has .*'\d\.(weight|bias)'"
KINDS = {
    "weights": Kind(lambda folder: dl.interop.save_merged(MODEL, PARAMS, folder), into_model, says=PARAMETER),
    "weights in shards": Kind(write_sharded, into_model, says=PARAMETER),
    "index of shards": Kind(write_sharded, into_model, "*.json", PARAMETER),
    "adapter": Kind(
        lambda folder: dl.interop.save_adapter(MODEL, PARAMS, folder) and None,
        lambda folder: dl.interop.load_adapter(MODEL, folder, seed=0),
        "adapter_*",
        "^the adapter has|^`folder` has an adapter",
    ),
    "checkpoint": Kind(write_checkpoint, read_checkpoint, "step-*/*"),
    "run's configuration": Kind(
        lambda folder: prepare_folder(CONFIG, folder, {"corpus": "abc"}),
        lambda folder: prepare_folder(
            dataclasses.replace(CONFIG, output=Output(resume=True, out=folder)), folder, {"corpus": "abc"}
        ),
    ),
    "metrics": Kind(write_metrics, lambda folder: read_metrics(folder / "metrics.jsonl", up_to=4)),
    "text": Kind(write_text, read_text, says="^the text must give at least 2 tokens for"),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_damaged_inputs_are_refused_by_name_or_read(kind: Kind, tmp_path: Path, request: pytest.FixtureRequest):
    good = tmp_path / "good"
    good.mkdir()
    kind.write(good)
    kind.read(good)
    refused = 0
    for seed in range(request.config.getoption("--damaged")):
        folder, damage = tmp_path / "bad", Damage(seed)
        shutil.copytree(good, folder)
        files = sorted(path for path in folder.glob(kind.spoils) if path.is_file())
        damage.spoil(damage.random.choice(files))
        before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        try:
            with nothing_run(), untouched(dict(MODEL.named_parameters()), STATE), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                kind.read(folder)
        except (ValueError, OSError) as error:
            refused += 1
            named = [path.name for path in before] + [str(folder)]
            if not any(name in str(error) for name in named) and not re.search(kind.says, str(error)):
                raise AssertionError(f"{seed}, {damage.story}: what is damaged must be named") from error
        except BaseException as error:
            error.add_note(f"{seed}, {damage.story}")
            raise
        assert {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()} == before
        shutil.rmtree(folder)
    assert refused
