"""Changed files are refused with an error that names them, or mean what the valid ones mean.

Only a file without checksums that is another valid one, such as with a flipped bit in a weight, may be read as
something else. ``--fuzz 10000`` draws ten thousand of them.
"""

import json
import os
import re
import shutil
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

import dynlora_fn as dl
from dynlora_fn.interop._checksums import SUMS, join_sums, record_sum
from models.finetune.load import load_model
from tests.support.damage import nothing_run
from tests.support.file_mutations import Mutation, mutate
from tests.support.finetune import llama

LONGEST_SECONDS = 20  # of a reader, which otherwise waits for ever


class Kind(NamedTuple):
    """One kind of input: a writer of valid input, and its reader."""

    write: Callable[[Path], Any]
    read: Callable[[Path], Any]
    files: str = "*"
    has_sums: bool = False
    weight: float = 1.0  # how often it is drawn


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))


MODEL = layers()
PARAMS = dl.init(MODEL, rank=2, seed=0, targets=["*.weight"])
STATE = {"params": dl.init(MODEL, rank=2, seed=0, targets=["*.weight"], base="int8"), "t": 3, "loss": 0.5}
TEMPLATE = {"params": dl.init(MODEL, rank=2, seed=1, targets=["*.weight"], base="int8"), "t": 0, "loss": 0.0}


def write_sharded(folder: Path) -> None:
    weights = {name: weight.detach() for name, weight in MODEL.state_dict().items()}
    names = sorted(weights)
    parts = {"part0.safetensors": names[:2], "part1.safetensors": names[2:]}
    for file, part in parts.items():
        dl.interop.save_weights({name: weights[name] for name in part}, folder / file)
    where = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def into_model(folder: Path) -> Any:
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    with dl.interop.open_weights(folder) as weights:
        return dl.init(empty, weights=weights, rank=2, seed=0, targets=["*.weight"])


def read_checkpoint(folder: Path) -> Any:
    loaded = dl.interop.load_checkpoint(folder, TEMPLATE, settings={"seed": 0})
    if loaded is None:
        raise ValueError(f"{folder} has no checkpoint")
    return loaded.state


KINDS = {
    "weights": Kind(lambda folder: dl.interop.save_merged(MODEL, PARAMS, folder), into_model),
    "weights in shards": Kind(write_sharded, into_model),
    "adapter": Kind(
        lambda folder: dl.interop.save_adapter(MODEL, PARAMS, folder),
        lambda folder: dl.interop.load_adapter(MODEL, folder, seed=0),
        "adapter_*",
    ),
    "model folder": Kind(
        lambda folder: llama().save_pretrained(folder),
        lambda folder: load_model(str(folder)).state_dict(),
        weight=0.2,
    ),
    "checkpoint": Kind(
        lambda folder: dl.interop.save_checkpoint(STATE, folder, step=1, settings={"seed": 0}),
        read_checkpoint,
        "step-*/*",
        has_sums=True,
    ),
}


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError("the reader waits for ever")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def is_same(result: Any, expected: Any) -> bool:
    leaves, others = (tree_flatten_with_path(tree)[0] for tree in (result, expected))
    return [path for path, _ in leaves] == [path for path, _ in others] and all(
        _is_same(leaf, other) for (_, leaf), (_, other) in zip(leaves, others, strict=True)
    )


def _is_same(leaf: Any, other: Any) -> bool:
    if isinstance(leaf, Tensor) and isinstance(other, Tensor):
        return leaf.dtype == other.dtype and torch.equal(leaf, other)
    return type(leaf) is type(other) and leaf == other


def outcome(kind: Kind, folder: Path, mutation: Mutation, expected: Any) -> str:
    """Return "refused", "the same", "another valid file", or what went wrong."""
    names = [path.name for path in folder.rglob("*")] + [str(folder), mutation.story.split(":")[0]]
    names += [mutation.name, *MODEL.state_dict(), "['params']", "['t']", "['loss']"]
    try:
        with nothing_run(), limited(LONGEST_SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = kind.read(folder)
    except TimeoutError as error:
        return f"waits: {error}"
    except (ValueError, OSError, TypeError) as error:
        is_helpful = not isinstance(error, UnicodeDecodeError | json.JSONDecodeError)
        content = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
        quoted = (name for name in re.findall(r"'([^']{3,})'", str(error)) if name.encode() in content)
        if is_helpful and (any(name in str(error) for name in names) or any(quoted)):
            return "refused"
        return f"names nothing: {type(error).__name__} {str(error)[:200]}"
    except Exception as error:
        return f"crashes: {type(error).__name__} {str(error)[:200]}"
    if is_same(result, expected):
        return "the same"
    return "another valid file" if mutation.may_differ and not kind.has_sums else "passes silently"


def sign_again(folder: Path) -> None:
    """Write the checksums of the files as they are, as a program that does not know the format would."""
    for checkpoint in folder.glob("step-*"):
        files = sorted(path for path in checkpoint.glob("*.safetensors") if path.is_file() and not path.is_symlink())
        for file in files:
            record_sum(file)
        if files:
            shutil.rmtree(checkpoint / SUMS) if (checkpoint / SUMS).is_dir() else (checkpoint / SUMS).unlink(True)
            join_sums(checkpoint)


def test_changed_files_are_refused_by_name_or_mean_the_same(tmp_path: Path, request: pytest.FixtureRequest):
    counts: Counter[str] = Counter()
    problems: dict[str, str] = {}
    expected: dict[str, Any] = {}
    for name, kind in KINDS.items():
        kind.write(tmp_path / name / "good")
        expected[name] = kind.read(tmp_path / name / "good")
    for seed in range(request.config.getoption("--fuzz") or 1000):
        random = Random(seed)
        (name,) = random.choices(list(KINDS), [kind.weight for kind in KINDS.values()])
        kind, folder = KINDS[name], tmp_path / name / "changed"
        shutil.copytree(tmp_path / name / "good", folder)
        files = sorted(path for path in folder.glob(kind.files) if path.is_file())
        mutation = mutate(random, random.choice(files))
        is_signed = kind.has_sums and random.random() < 0.5
        if is_signed:
            sign_again(folder)
        result = outcome(kind._replace(has_sums=kind.has_sums and not is_signed), folder, mutation, expected[name])
        counts[result.partition(":")[0]] += 1
        if result not in ("refused", "the same", "another valid file"):
            story = re.sub(r"\d+", "N", f"{name}, {mutation.story}{', signed' * is_signed}: {result}")
            problems.setdefault(story[:150], f"seed {seed}: {mutation.story}: {result}")
        shutil.rmtree(folder)
        shutil.rmtree(folder.parent / "outside", ignore_errors=True)
    print(*counts.items(), sep="\n")
    listed = "\n".join(f"{story}\n    {problem}" for story, problem in sorted(problems.items()))
    assert not problems, f"{dict(counts)}\n{listed}"


def test_a_file_that_is_not_readable_is_named(tmp_path: Path):
    if os.geteuid() == 0:
        pytest.skip("the root user may read every file")
    for name, kind in KINDS.items():
        kind.write(tmp_path / name)
        for file in sorted(path for path in (tmp_path / name).glob(kind.files) if path.is_file()):
            file.chmod(0)
            with pytest.raises((OSError, ValueError), match=re.escape(file.name)):
                kind.read(tmp_path / name)
            file.chmod(0o600)
