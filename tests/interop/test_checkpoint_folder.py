"""What a folder of checkpoints contains: complete ones, and whatever else a user keeps there."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import dynlora_fn as dl
from tests.support.checkpoints import STATE, TEMPLATE, trained

load, save = dl.interop.load_checkpoint, dl.interop.save_checkpoint

COPIES = ("step-best", "step-last", "step-00000010.bak", "step-0000002", "step-٠٠٠٠٠٠٠٢", "other")


def test_folders_of_other_names_are_left_alone(tmp_path: Path):
    save(STATE, tmp_path, step=1)
    for name in COPIES:
        shutil.copytree(tmp_path / "step-00000001", tmp_path / name)
    for step in (2, 3, 4):
        save({**STATE, "t": step}, tmp_path, step=step, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000003", "step-00000004", *COPIES}
    loaded = load(tmp_path, TEMPLATE)
    assert loaded is not None
    assert (loaded.step, loaded.state["t"], loaded.refused) == (4, 4, [])


def test_a_later_checkpoint_does_not_displace_new_ones(tmp_path: Path):
    """It may be damaged, so that the run went on from an older one."""
    for step in (1, 2, 9):
        save(STATE, tmp_path, step=step)
    (tmp_path / "step-00000009" / "state.safetensors").write_bytes(b"")
    save(STATE, tmp_path, step=3, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000009"]
    save({**STATE, "t": 8}, tmp_path, step=9, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000009"]
    assert (load(tmp_path, TEMPLATE) or pytest.fail("none")).state["t"] == 8


def test_what_a_killed_process_has_left_is_removed_and_user_files_are_not(tmp_path: Path):
    for name in (".writing-00000007", ".replaced-00000007", ".writing-mine"):
        (tmp_path / name).mkdir()
    save(STATE, tmp_path, step=1)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", ".writing-mine"}


def test_an_error_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(STATE, tmp_path, step=1)
    before = sorted(path for path in tmp_path.rglob("*"))

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dynlora_fn.interop._checkpoint_save.record_sum", fail)
    with pytest.raises(OSError, match="No space left on device"):
        save(STATE, tmp_path, step=2)
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_files_are_safetensors_with_sums_and_equal_states_make_equal_files(tmp_path: Path):
    for name in ("a", "b"):
        save(trained() | {"rate": 0.1}, tmp_path / name, step=7, settings={"seed": 0, "lr": 1})
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "step-00000007").iterdir()} for name in "ab"
    )
    assert first == second
    assert sorted(first) == ["SHA256SUMS", "state.safetensors"]
    folder = tmp_path / "a" / "step-00000007"
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    names = set(dl.interop.open_weights(folder / "state.safetensors"))
    assert names == set(dl.parallel.as_dtensors(trained()))


def test_a_checkpoint_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(STATE, tmp_path, step=1)
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name.startswith(".writing"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output error"):
        save({**STATE, "t": 9}, tmp_path, step=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert (load(tmp_path, TEMPLATE) or pytest.fail("none")).state["t"] == 3


@pytest.mark.parametrize("use", ["load", "save"])
def test_a_checkpoint_that_a_killed_process_was_replacing_is_not_lost(use: str, tmp_path: Path):
    save(STATE, tmp_path, step=1)
    (tmp_path / "step-00000001").rename(tmp_path / ".replaced-00000001")
    if use == "save":
        save(STATE, tmp_path, step=2)
    loaded = load(tmp_path, TEMPLATE, step=1)
    assert loaded is not None
    assert (loaded.step, loaded.state["t"]) == (1, STATE["t"])
