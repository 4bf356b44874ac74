"""What each method trains with each optimizer, and in which dtype."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.finetune import Given, llama, save_given, settings
from tests.support.pretrain import Job

transformers = pytest.importorskip("transformers")


def written(folder: Path, dtype: str | torch.dtype = "auto") -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def moved(folder: Path, before: Path) -> dict[str, float]:
    """Return how far each parameter moved."""
    old = dict(written(before).named_parameters())
    return {name: (new - old[name]).abs().max().item() for name, new in written(folder).named_parameters()}


@pytest.mark.parametrize(
    ("method", "optimizer", "rest"),
    list(itertools.product(["full", "lora", "relora", "switchlora"], ["adamw", "muon"], [False, True])),
)
def test_the_matrices_move_by_lr_and_the_others_by_dense_lr(
    job: Job, given: Given, tmp_path: Path, method: str, optimizer: str, rest: bool
):
    changed = {"method": method, "optimizer": optimizer, "steps": 4, "warmup": 1, "lr": 1e-3, "dense-lr": 1e-6}
    changed |= {"export": "merged", "merge-every": 2, "interval": 10} | ({"train-rest": True} if rest else {})
    outcome = job(*settings(given, tmp_path / "run", **changed))
    assert outcome.code == 0, outcome.err
    for name, by in moved(tmp_path / "run" / "model", given.model).items():
        if "_proj" in name:
            assert by > 1e-5, name
        elif rest or method == "full":
            assert 0 < by < 1e-5, name
        else:
            assert by == 0, name


@pytest.mark.parametrize("method", ["full", "lora"])
def test_targets_are_what_lr_trains_also_some_layers_of_a_stack(job: Job, given: Given, tmp_path: Path, method: str):
    changed = {"targets": "model.layers.1.*_proj.weight", "steps": 4, "warmup": 1, "lr": 1e-3, "dense-lr": 1e-7}
    outcome = job(*settings(given, tmp_path / "run", method=method, export="merged", **changed))
    assert outcome.code == 0, outcome.err
    for name, by in moved(tmp_path / "run" / "model", given.model).items():
        assert (by > 1e-5) == ("layers.1" in name and "_proj" in name), name


@pytest.mark.parametrize("method", ["full", "lora"])
def test_targets_without_a_match_are_refused(job: Job, given: Given, tmp_path: Path, method: str):
    outcome = job(*settings(given, tmp_path / "run", method=method, targets="no.such"))
    assert outcome.code == 2
    assert "`targets` contains 'no.such', which matches no name" in outcome.err
    assert not (tmp_path / "run").exists()


def trained(job: Job, given: Given, out: Path, **changed: object) -> dict[str, torch.Tensor]:
    outcome = job(*settings(given, out, export="merged", **changed))
    assert outcome.code == 0, outcome.err
    return {name: weight.detach().float() for name, weight in written(out / "model", torch.float32).named_parameters()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [{"method": "full"}, {"train-rest": True}, {"train-rest": True, "base-dtype": "bfloat16"}]
)
def test_a_checkpoint_of_16_bits_trains_in_float32_and_keeps_its_dtype(
    job: Job, tmp_path: Path, dtype: torch.dtype, options: dict[str, object]
):
    model = llama(initializer_range=0.05).to(dtype)
    low = save_given(model, tmp_path / "low")
    full = save_given(model.float(), tmp_path / "float32")
    options = {**options, "steps": 10, "lr": 1e-3, "warmup": 1}
    measured, right = (trained(job, given, given.model.parent / "run", **options) for given in (low, full))
    eps = torch.finfo(dtype).eps
    for name, weight in right.items():
        torch.testing.assert_close(
            measured[name], weight, rtol=eps, atol=1e-5, msg=lambda text, of=name: f"{of}: {text}"
        )
    assert not torch.equal(right["model.norm.weight"], torch.ones(16))
    assert {leaf.dtype for leaf in load_file(low.model.parent / "run" / "model" / "model.safetensors").values()} == {
        dtype
    }


def test_a_rate_of_nearly_zero_does_not_move_a_checkpoint_of_16_bits(job: Job, tmp_path: Path):
    given = save_given(llama(initializer_range=0.05).bfloat16(), tmp_path)
    before = {name: weight.detach().float() for name, weight in written(given.model).named_parameters()}
    after = trained(job, given, tmp_path / "run", steps=40, lr=1e-30, interval=10)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_checkpoint_of_several_dtypes_is_written_in_float32_and_says_so(job: Job, given: Given, tmp_path: Path):
    mixed = save_given(llama(), tmp_path)
    file = mixed.model / "model.safetensors"
    weights = {name: leaf if "norm" in name else leaf.bfloat16() for name, leaf in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    outcome = job(*settings(mixed, tmp_path / "run", export="merged", steps=2))
    assert outcome.code == 0, outcome.err
    assert "model/ is in float32, since the given model has several dtypes: bfloat16, float32" in outcome.out
    assert {leaf.dtype for leaf in load_file(tmp_path / "run" / "model" / "model.safetensors").values()} == {
        torch.float32
    }


def test_a_first_step_is_as_long_as_alpha(job: Job, given: Given, tmp_path: Path):
    """From ``b = 0``, AdamW moves every entry of `b` by the rate, so the weight moves by alpha times as much."""
    options = {"method": "lora", "steps": 1, "warmup": 1, "lr": 1e-4, "export": "merged"}
    by = {}
    for alpha in (None, 1, 8):
        out = tmp_path / f"run-{alpha}"
        outcome = job(*settings(given, out, **options, **({} if alpha is None else {"alpha": alpha})))
        assert outcome.code == 0, outcome.err
        by[alpha] = moved(out / "model", given.model)["model.layers.0.self_attn.q_proj.weight"]
    assert by[8] == pytest.approx(8 * by[1], rel=0.01)
    assert by[None] == pytest.approx(4 * by[1], rel=0.01)  # the rank


@pytest.mark.parametrize("alpha", ["0", "-1", "nan", "inf"])
def test_an_alpha_that_is_not_positive_is_refused(job: Job, given: Given, tmp_path: Path, alpha: str):
    outcome = job(*settings(given, tmp_path / "run", alpha=alpha))
    assert outcome.code == 2
    assert "`alpha` must be positive and finite, got" in outcome.err
