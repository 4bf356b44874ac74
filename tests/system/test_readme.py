"""The examples in the README and on the packages' pages run."""

import re
from functools import partial

import pytest
import torch

from dynlora_fn.testing import assert_same
from tests.support.paths import ROOT
from tests.support.processes import in_processes
from tests.support.zoo import CASES, EAGER_ONLY

README = (ROOT / "README.md").read_text()
PAGES = {path.parent.name: path.read_text() for path in (ROOT / "dynlora_fn").glob("*/README.md")}


def block_with(text: str, page: str) -> str:
    """Return the one block of Python on a page that contains a text."""
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if text in block)
    return block


LOOP = block_with("compile_step", README)


def test_the_loop_is_short_and_early():
    assert README[: README.index(LOOP)].count("\n") < 20
    assert LOOP.count("\n") < 40


def test_the_readme_is_short():
    assert README.count("\n") <= 200


def test_the_pages_of_the_readme_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert links
    assert all((ROOT / link).is_file() for link in links)


@pytest.mark.slow
def test_the_loop_learns_and_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Only the compiler's backend is replaced: Inductor takes a minute on a CPU and is tested elsewhere."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.manual_seed(0)
    names: dict = {}
    exec(LOOP, names)
    batch = torch.randn(512, 64)
    error = (names["model"](batch) - batch.roll(1, -1)).square().mean()
    assert error.item() < 0.5, "the targets' variance is 1, and a constant is no better than that"
    assert re.search(r"step 300: loss 0\.[0-4]\d\d", capsys.readouterr().out)
    params = names["dl"].combine(*names["state"][:2])
    assert {name: tuple(param.base.shape) for name, param in params.items() if name.endswith("weight")} == {
        "0.weight": (256, 64),
        "2.weight": (64, 256),
    }


def test_the_block_on_low_precision_runs_and_its_drift_is_small(capsys: pytest.CaptureFixture[str]):
    names: dict = {}
    exec(block_with("to_torchao", PAGES["bases"]), names)
    drifts = names["dl"].bases.drift(names["params"])
    assert {type(names["state"][name]).__name__ for name in drifts} == {"Int8Tensor"}
    assert all(0 < value < 0.01 for value in drifts.values())
    assert str(drifts) in capsys.readouterr().out


def test_the_three_ways_to_declare_roles_are_equal():
    names: dict = {}
    exec(block_with("register_state", PAGES["optim"]), names)
    (mine,), (theirs,), plain = names["chain"]
    slot = names["plan"]["w"].a.slots
    assert not mine["w"].b[:, slot].any()
    assert_same((theirs, plain["square"]), (mine, mine))


def test_the_bugs_that_the_kit_is_shown_with_are_found(capsys: pytest.CaptureFixture[str]):
    exec((ROOT / "models" / "guides" / "testing_a_transform.py").read_text(), {})
    weight, state = capsys.readouterr().out.split("promised: ")[1:]
    assert re.match(
        r"the weight does not change\nhappened: off by up to (.|\n)*Shape\(out_features=2, in_features=2, rank=2\)",
        weight,
    )
    assert re.match(
        r"the state of the counterparts .* is reset, and nothing else changes\n"
        r"happened: \.inner\.mu\['w'\]\.[ba], slot 0 is the counterpart of a switched vector and has (.|\n)*rank=1",
        state,
    )


def test_the_table_of_models_is_what_is_tested():
    rows = [
        line.strip("| ").split(" | ")
        for line in PAGES["nn"].splitlines()
        if line.endswith(("| yes | yes |", "| no | yes |"))
    ]
    assert rows == [[name, "yes", "yes", "no" if name in EAGER_ONLY else "yes", "yes"] for name in CASES]


def test_in_and_out_runs(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block_with("save_adapter", PAGES["interop"]), names)
    assert len(names["errors"]) == 2 * 7 + 1
    assert names["params"]["model.layers.*.mlp.up_proj.weight"].factors.b.shape == (2, 24, 4)


@pytest.mark.slow
def test_the_loop_of_several_processes_learns_the_same_on_each():
    block = (ROOT / "models" / "guides" / "several_processes.py").read_text()
    losses, shapes = zip(*in_processes(2, _run_in_a_group, block), strict=True)
    assert losses[0] == losses[1] < 0.6, "the targets' variance is 1, and a constant is no better than that"
    assert shapes[0] == {"0.weight": (128, 64), "2.weight": (32, 256)}


def _run_in_a_group(block: str) -> tuple[float, dict]:
    torch.compile = partial(torch.compile, backend="aot_eager")  # in another process
    join, leave = torch.distributed.init_process_group, torch.distributed.destroy_process_group
    torch.distributed.init_process_group = torch.distributed.destroy_process_group = lambda *_: None  # of this test
    names: dict = {}
    exec(block, names)
    torch.distributed.init_process_group, torch.distributed.destroy_process_group = join, leave
    params = names["dl"].combine(*names["state"][:2])
    shapes = {name: tuple(param.base.base.codes.codes.shape) for name, param in params.items() if "weight" in name}
    return names["loss"].item(), shapes
