"""The programs as console scripts, outside the repository."""

import logging
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from models import scripts
from models.program import hide_import_messages
from tests.support.paths import ROOT

SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
SCRIPTS = SETTINGS["project"]["scripts"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_has_its_program(name: str):
    module, _, function = SCRIPTS[name].partition(":")
    assert (module, f"dynlora-{function}") == ("dynlora_models.scripts", name)
    assert callable(getattr(scripts, function))
    assert "def main() -> None:" in (ROOT / "models" / function / "__main__.py").read_text()


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("is_script", [True, False], ids=["script", "module"])
def test_the_usage_names_the_command_that_was_typed(
    name: str, is_script: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    module = f"models.{name.removeprefix('dynlora-')}"
    path, command = (f"/bin/{name}", name) if is_script else (f"{module}/__main__.py", f"python -m {module}")
    monkeypatch.setattr(sys, "argv", [path, "--help"])
    with pytest.raises(SystemExit, match="0"):
        import_module(f"{module}.__main__").main()
    assert " ".join(capsys.readouterr().out.split()).startswith(f"usage: {command} [")


def installed(folder: Path) -> Path:
    """Return a folder like `site-packages`, with the packages where pyproject.toml puts them."""
    (folder / "dynlora_fn").symlink_to(ROOT / "dynlora_fn")
    (folder / "dynlora_models").symlink_to(ROOT / "models")
    return folder


def run_script(folder: Path, *arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run `dynlora-pretrain` in a folder with a package `models` of somebody else."""
    (folder / "work" / "models").mkdir(parents=True)
    (folder / "work" / "models" / "__init__.py").write_text("raise RuntimeError('another package')")
    script = folder / "work" / "dynlora-pretrain"
    script.write_text(
        f"import sys\nsys.path[0] = {str(folder)!r}\n{before}\nfrom dynlora_models.scripts import *\npretrain()"
    )
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, cwd=folder / "work", capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_script_runs_outside_the_repository(tmp_path: Path):
    (tmp_path / "text.txt").write_text("".join(f"line {index}\n" for index in range(500)))
    sizes = {"rank": 4, "batch-size": 2, "seq-len": 16, "steps": 2, "eval-batches": 1}
    small = ["--model", "llama-tiny", *(text for name, size in sizes.items() for text in (f"--{name}", str(size)))]
    outcome = run_script(installed(tmp_path), *small, "--text", str(tmp_path / "text.txt"), "--out", "run")
    assert outcome.returncode == 0, outcome.stderr
    assert (tmp_path / "work" / "run" / "model.safetensors").is_file()


def test_a_missing_extra_is_one_line(tmp_path: Path):
    outcome = run_script(installed(tmp_path), before="sys.modules['tyro'] = None")
    assert outcome.returncode == 2
    assert outcome.stderr == "error: dynlora-pretrain needs the package 'tyro': pip install 'dynlora-fn[train]'\n"


def test_every_package_is_installed():
    settings = SETTINGS["tool"]["setuptools"]
    folders = {"dynlora_fn": "dynlora_fn", **settings["package-dir"]}
    parents = {path.parent for name in folders.values() for path in (ROOT / name).rglob("*.py")}
    assert all((parent / "__init__.py").is_file() for parent in parents)
    names = {folder: name for name, folder in folders.items()}
    relative = [parent.relative_to(ROOT).parts for parent in parents]
    assert sorted(settings["packages"]) == sorted(".".join([names[first], *rest]) for first, *rest in relative)


def test_what_imports_log_does_not_precede_the_output(caplog: pytest.LogCaptureFixture):
    hide_import_messages()
    logging.getLogger("torchao").warning("Failed to load kernels.so")
    logging.getLogger("torch.utils._pytree").warning(
        "%s is an Enum subclass and is now natively supported", "<enum 'KernelPreference'>"
    )
    logging.getLogger("torchao").warning("other")
    assert [record.getMessage() for record in caplog.records] == ["other"]
