"""Every benchmark runs and reports its ratios; their values are not tested."""

import contextlib
import io
import json
import os
import runpy
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.processes import in_processes

RESIDUALS = ("none", "int8", "bfloat16")
KEYS = {
    "step": {"switched_over_full", "switched_over_full_eighth", "switched_over_static", "ours_over_peft"},
    "step_by_method": {"full rank", "full rank, torch.optim.Muon", "GaLore", "APOLLO", "LoRA", "switched"}
    | {"switched, compensated", "switched, Muon", "muon_over_full", "muon_over_full_muon", "one side, Muon at d/2"},
    "switch": {"switch_over_copy"},
    "memory": {"extra_peak_over_weight", "remat_peak_ratio"},
    "memory_by_base": {"int8+bfloat16 state", "nf4+bfloat16 peak", "bfloat16+none total"},
    "ensemble": {"forward_over_held", "step_over_held", "largest_difference"},
    "compile_time": {"compile_deep_over_shallow", "call_overhead_ms"},
    "drift": {f"{base}+{residual}" for base in ("bfloat16", "int8", "float8", "nf4") for residual in RESIDUALS}
    | {"int8+bfloat16 deferred", "nf4+none deferred"},
    "scale": {"reduced_over_full_rank", "trainable_at_512"},
    "gpu": {"full rank, torch.optim.Muon at 64", "ours, AdamW, switching at 64", "ours, nvfp4+bfloat16 at 64"},
    "growth": {"init", "gradients_memory", "names", "checkpoint", "first_call", "goals", "met"},
    "finetune": {"largest_loss_over_peft", "least_loss_over_peft", "mean_gain_over_peft", "largest_error_of_files"},
    "quality_by_base": {"float32+none", "int8+bfloat16"},
}
BILLION = {"peak_of_all", "float32: init", "bfloat16: resume"}
READ_PEAKS = ("memory", "memory_by_base", "ensemble", "growth")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "flags"), [*((name, ()) for name in KEYS), ("growth", ("--billion",))])
def test_a_benchmark_runs(name, flags, tmp_path):
    if name in READ_PEAKS and not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a process is read from Linux's /proc")
    out = tmp_path / "results.json"
    (printed,) = in_processes(1, _run, name, out, *flags)
    results = json.loads(printed.splitlines()[-1])
    assert (BILLION if flags else KEYS[name]) <= results.keys()
    written = json.loads(out.read_text())
    assert written["raw"]
    assert {key: written[key] for key in results} == results
    assert {"device", "torch", "commit", "command"} <= written["environment"].keys()


def _run(name: str, out: Path, *flags: str) -> str:
    """Run ``python -m bench.NAME`` in a process that has imported torch."""
    os.chdir(ROOT)
    sys.argv = [f"bench.{name}", "--quick", "--json", "--device", "cpu", "--out", str(out), *flags]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_module(f"bench.{name}", run_name="__main__", alter_sys=True)
    return printed.getvalue()


def test_the_papers_figures_come_out_of_what_counts_the_bytes():
    """At 1.3B (arXiv:2406.06564) there are 54 % fewer trainable parameters, and so fewer bytes to reduce."""
    from bench.scale import paper_figures  # noqa: PLC0415

    found = paper_figures()
    assert round(found["full_rank_parameters"] / 1e6, 1) == 1339.5
    assert round(found["trainable_at_512"] / 1e6, 1) == 609.7
    assert round(found["trainable_at_256"] / 1e6, 1) == 370.7
    assert round(found["reduced_over_full_rank"] - 1, 2) == -0.54


def test_the_pictures_show_the_shapes(tmp_path):
    figures = pytest.importorskip("bench.figures")
    figures.main(tmp_path)
    for name in ("weight", "step"):
        text = (tmp_path / f"{name}.svg").read_text()
        assert f"({figures.OUT}, {figures.IN})" in text
        assert (figures.FOLDER / f"{name}.svg").is_file()
