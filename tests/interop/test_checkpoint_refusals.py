"""What does not fit a state, or is damaged, is refused by name, and the checkpoint before it is taken."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dynlora_fn as dl
from tests.support.checkpoints import STATE, TEMPLATE, trained
from tests.support.damage import damage_by_a_bit, damage_by_truncation

load, save = dl.interop.load_checkpoint, dl.interop.save_checkpoint


class Unknown:
    def __repr__(self) -> str:
        return "an object"


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (Unknown(), r"`state` has an object at \['x'\], which a checkpoint cannot store"),
        (torch.Generator(), r"at \['x'\], which a checkpoint cannot store; .*`generator.get_state\(\)`"),
        (torch.empty(2, device="meta"), r"`state` has a tensor on the meta device at \['x'\]"),
        (torch.eye(2).to_sparse(), r"`state` has a tensor of layout torch.sparse_coo at \['x'\]"),
        (torch.ones(2, dtype=torch.complex128), r"dtype torch.complex128 at \['x'\], which safetensors cannot store"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_its_path(leaf: Any, message: str, tmp_path: Path):
    for call in (lambda: save({"x": leaf}, tmp_path / "new", step=1), lambda: load(tmp_path, {"x": leaf})):
        with pytest.raises(TypeError, match=message.replace("`state`", "`(state|template)`")):
            call()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (lambda: trained(rank=3), r"\['params'\]\['layers.\*.w'\].factors.b is \(2, 64, 32\) torch.float32 instead of"),
        (
            lambda: trained(base="int8"),
            r"contains other tensors: \['params'\]\['layers.\*.w'\].base.codes.* is missing",
        ),
        (lambda: trained(dtype=torch.bfloat16), r"factors.b is .* torch.float32 instead of .* torch.bfloat16"),
        (lambda: trained(optimizer=dl.optim.lion()), r"it contains other tensors: \['optimizer'\]"),
        (lambda: trained(optimizer=dl.optim.adamw(moments="8bit")), r"\['optimizer'\].*mu.*codes.* is missing"),
        (
            lambda: trained() | {"t": torch.tensor(0)},
            r"it contains other tensors: \['t'\], \(\) torch.int64, is missing",
        ),
        (lambda: trained() | {"t": 0}, r"it contains other tensors: \['t'\], a number, is missing"),
        (lambda: {"params": trained()["params"]}, r"\['optimizer'\].*, \(.*\) torch\..*, has no place"),
        (lambda: trained() | {"optimizer": 3}, r"\['optimizer'\], a number, is missing"),
    ],
)
def test_another_state_is_refused_by_its_first_leaf(template: Callable[[], Any], message: str, tmp_path: Path):
    save(trained(), tmp_path, step=1)
    with pytest.raises(ValueError, match=rf"^`folder` has no checkpoint that fits: .*step-00000001: .*{message}"):
        load(tmp_path, template())


def test_values_of_other_kinds_are_refused(tmp_path: Path):
    save({"x": 1}, tmp_path, step=1)
    for value, kind in ((True, "a flag"), ("1", "a text"), (torch.tensor(1), r"\(\) torch.int64")):
        with pytest.raises(ValueError, match=rf"\['x'\] is a number instead of {kind}"):
            load(tmp_path, {"x": value})


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def into_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def into_link(path: Path) -> None:
    path.rename(path.parent.parent / "moved")
    path.symlink_to(path.parent.parent / "moved")


DAMAGES = (damage_by_truncation, damage_by_a_bit, remove, empty, into_pipe, into_folder, into_link)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["state.safetensors", "SHA256SUMS"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_taken(
    damage: Callable[[Path], None], file: str, tmp_path: Path
):
    save({**STATE, "t": 1}, tmp_path, step=1)
    save(STATE, tmp_path, step=2)
    damage(tmp_path / "step-00000002" / file)
    loaded = load(tmp_path, TEMPLATE)
    assert loaded is not None
    assert (loaded.step, loaded.state["t"]) == (1, 1)
    ((path, reason, is_damaged),) = loaded.refused
    assert path == tmp_path / "step-00000002"
    assert is_damaged
    assert "state.safetensors" in reason or "SHA256SUMS" in reason
    with pytest.raises(ValueError, match=r"has no checkpoint that fits: .*step-00000002: "):
        load(tmp_path, TEMPLATE, step=2)


@pytest.mark.parametrize("change", [into_pipe, remove, into_link])
def test_what_is_no_folder_is_no_checkpoint(change: Callable[[Path], None], tmp_path: Path):
    save({**STATE, "t": 1}, tmp_path, step=1)
    (tmp_path / "step-00000002").write_text("")
    change(tmp_path / "step-00000002")
    loaded = load(tmp_path, TEMPLATE)
    assert loaded is not None
    assert loaded.step == 1
    assert [str(reason) for _, reason, _ in loaded.refused] == ["it is not a folder"] * (change is not remove)
    if change is not remove:
        with pytest.raises(OSError, match="step-00000002' is not a folder; move it away"):
            save(STATE, tmp_path, step=2)
    assert sorted(path.name for path in tmp_path.glob("[.s]*"))[:1] == ["step-00000001"]


def test_a_checkpoint_in_the_folder_of_another_step_is_refused(tmp_path: Path):
    for step in (1, 2):
        save({**STATE, "t": step}, tmp_path, step=step)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000003")
    loaded = load(tmp_path, TEMPLATE)
    assert loaded is not None
    assert (loaded.step, loaded.state["t"]) == (2, 2)
    assert loaded.refused == [(tmp_path / "step-00000003", "it is of step 1, but its name has another step", False)]


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path):
    settings = {"seed": 0, "lr": 0.1, "targets": ("a", "b"), "decay": None}
    save(STATE, tmp_path, step=1, settings=settings)
    save(STATE, tmp_path, step=2, settings=settings | {"seed": 1})
    loaded = load(tmp_path, TEMPLATE, settings={**settings, "new": 3, "targets": ["a", "b"]})
    assert loaded is not None
    assert loaded.step == 1
    assert loaded.refused == [(tmp_path / "step-00000002", "it has the setting seed 1 instead of 0", False)]
    assert (load(tmp_path, TEMPLATE) or loaded).step == 2
    for wrong in ({"x": object()}, ["seed"], {1: 2}, "seed"):
        with pytest.raises(TypeError, match=r"`settings` (is|has) "):
            save(STATE, tmp_path, step=3, settings=wrong)  # type: ignore[arg-type]


def test_arguments_are_refused_by_name(tmp_path: Path):
    for step in (-1, 0.5, 10**8, True, "1"):
        with pytest.raises((TypeError, ValueError), match="`step` is "):
            save(STATE, tmp_path, step=step)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`keep` is 0"):
        save(STATE, tmp_path, step=1, keep=0)
    save(STATE, tmp_path, step=1)
    with pytest.raises(ValueError, match=r"`folder` is '.*step-00000001', which is one checkpoint"):
        load(tmp_path / "step-00000001", TEMPLATE)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"`folder` is '.*file', which is not a folder"):
        load(tmp_path / "file", TEMPLATE)
    with pytest.raises(ValueError, match=r"has no checkpoint of step 5, but of \[1\]"):
        load(tmp_path, TEMPLATE, step=5)
    with pytest.raises(TypeError, match="`group` is 3"):
        save(STATE, tmp_path, step=1, group=3)  # type: ignore[arg-type]
    assert load(tmp_path / "none", TEMPLATE) is None
