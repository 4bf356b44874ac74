"""The runs of the study: every method learns, and stores and sends what it says."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dynlora_fn as dl
from bench.quality import study_schedules
from bench.quality.execute import execute
from bench.quality.experiments import LOW
from bench.quality.job import Job, is_inner
from bench.quality.runs import METHODS, SIZES, Run
from bench.quality.spectron import best_factors, spectral_norm
from bench.quality.study import make_method
from bench.quality.sweeps import CENTERS
from bench.support.process_memory import count_bytes
from dynlora_fn.testing import Shape, assert_within, low_rank, normal
from models import corpus as text
from models.pretrain.learning_rate import warmup_cosine

PATH = "".join(f"line {index}: {index * index}\n" for index in range(400))


@pytest.fixture(scope="module")
def job() -> Job:
    documents = [text.Document("train", PATH), text.Document("validation", PATH)]
    corpus = text.tokenize(text.Split(documents[:1], documents[1:]), text.byte_tokenizer(), window=33)
    return Job(SIZES["tiny"], corpus, backend="eager")


VARIANTS = [
    *(Run("tiny", method) for method in METHODS if method != "switchlora"),
    Run("tiny", "switchlora", interval=10),
    Run("tiny", "switchlora", candidates="pool", interval=10),
    Run("tiny", "switchlora", candidates="pool", order="random", interval=10),
    Run("tiny", "switchlora", candidates="orthogonal", interval=10),
    Run("tiny", "switchlora", incoming="zero", interval=20),
    Run("tiny", "switchlora", rule="transport", interval=10),
    Run("tiny", "switchlora", start_scale=0.5, side_lr=4.0, interval=10),
    Run("tiny", "switchlora", ratio=0.0, floor=0.2, until=0.8, interval=10),
    Run("tiny", "switchlora", base="int8+bfloat16", interval=10, compensate=0.1),
    Run("tiny", "switchlora", interval=10, compensate=0.1, reduced="int8", compensate_every=2),
    Run("tiny", "switchlora", beta2=0.99, moments="8bit", gradients="bfloat16", interval=10),
    Run("tiny", "full", base="int8+bfloat16", moments="8bit", gradients="bfloat16"),
    Run("tiny", "full", optimizer="muon", base="int8+bfloat16"),
    Run("tiny", "switchlora", 2, optimizer="muon", trained="b", interval=10),
    Run("tiny", "switchlora", 2, optimizer="muon", **LOW, factors="bfloat16", interval=10),
    Run("tiny", "switchlora", 2, optimizer="muon", **LOW, factors="bfloat16", trained="b", interval=10),
    Run("tiny", "switchlora", optimizer="muon", dense_optimizer="scale", interval=10),
    Run("tiny", "switchlora", base="nf4+bfloat16", interval=10),
    Run("tiny", "switchlora", base="nf4", every=5, interval=20),
    *(Run("tiny", "switchlora", base=f"{kind}+bfloat16", interval=10) for kind in ("float8", "nvfp4")),
    Run("tiny", "full", optimizer="muon", base="nvfp4+bfloat16", dense_optimizer="scale"),
]


@pytest.mark.slow
@pytest.mark.parametrize("run", VARIANTS, ids=lambda run: "-".join(str(value) for value in run.described().values()))
@torch.compiler.set_stance("force_eager")  # tracing takes longer than the run; one test below has it
def test_every_method_learns_and_repeats_itself(job, run):
    run = replace(run, lr=CENTERS[run.method])
    run = replace(run, ratio=0.0) if run.method == "switchlora" else run  # so that 24 steps have switches
    result = execute(job, run, make_method)
    assert result["loss"] < result["curve"][0][1] - 0.05
    assert result["bytes"]["state"] > 0
    if run.method == "switchlora":
        assert result["measures"]["switched"] > 0
        # In low precision the weight that products see moves by its rounding.
        assert result["measures"]["largest_jump"] < (1e-4 if run.base == "float32" else 0.05)
    assert execute(job, run, make_method)["curve"] == result["curve"]


@pytest.mark.slow
def test_what_is_trained_goes_by_the_gradients_of_the_library(job):
    run = Run("tiny", "switchlora")
    method, tokens = make_method(job, run), job.batch(0, 0)
    trainable, frozen = dl.partition(method.params)
    wanted = dl.value_and_grad(lambda trainable: job.loss(dl.combine(trainable, frozen), tokens))(trainable)
    loss, grads = job.gradients(method.weights(), tokens)
    assert_within(loss, wanted.value, 1e-5)
    for name, grad in dl.optim.project_gradients(grads, method.params).items():
        for leaf, wanted_leaf in zip(
            *(torch.utils._pytree.tree_leaves(tree) for tree in (grad, wanted.grads[name])), strict=True
        ):
            assert_within(leaf, wanted_leaf, 1e-5 * wanted_leaf.abs().max() + 1e-9)


@pytest.mark.parametrize(
    "run",
    [
        Run("tiny", "full"),
        Run("tiny", "lora"),
        Run("tiny", "switchlora"),
        Run("tiny", "switchlora", trained="b"),
        Run("tiny", "switchlora", factors="bfloat16"),
        Run("tiny", "switchlora", factors="bfloat16", trained="b"),
    ],
)
def test_what_is_sent_is_what_is_trained(job, run):
    method = make_method(job, run)
    trained = method.weights() if run.method == "full" else dl.partition(method.params).trainable
    assert run.sent_bytes() == count_bytes(trained)


@pytest.mark.parametrize(("base", "bits"), [("nf4", 4), ("nf4+bfloat16", 20), ("int8+bfloat16", 24), ("bfloat16", 16)])
def test_a_base_has_the_formats_of_its_name(job, base, bits):
    run = Run("tiny", "switchlora", base=base)
    stored, entries = make_method(job, run).bytes()["bases"], SIZES["tiny"].parameters()
    assert bits / 8 <= stored / entries < bits / 8 + 0.5  # scales add a few bytes


def test_factors_in_bfloat16_take_half_the_bytes(job):
    run = Run("tiny", "switchlora", 2, optimizer="muon")
    half = replace(run, factors="bfloat16")
    plain, small = make_method(job, run).bytes(), make_method(job, half).bytes()
    assert 2 * small["factors"] == plain["factors"]
    assert small["state"] == plain["state"]  # moments are in float32
    gradients = replace(run, gradients="bfloat16")
    assert replace(gradients, factors="bfloat16").sent_bytes() == gradients.sent_bytes() == run.sent_bytes() / 2


def test_scale_stores_one_moment_of_the_head_and_none_of_the_embedding(job):
    run = Run("tiny", "switchlora", optimizer="muon")
    states = [make_method(job, each).bytes()["state"] for each in (run, replace(run, dense_optimizer="scale"))]
    # AdamW stores two moments of both.
    assert states[0] - states[1] == pytest.approx(3 * 4 * 256 * SIZES["tiny"].width, abs=16)


def test_spectron_moves_a_weight_by_its_rate_and_stores_only_factors(job):
    run = replace(Run("tiny", "spectron"), lr=0.5)
    method, tokens = make_method(job, run), job.batch(0, 0)
    before = method.weights()
    _, grads = job.gradients(before, tokens)
    method.update(0, grads, tokens, 1.0)
    for name in filter(is_inner, before):
        moved = torch.linalg.matrix_norm(method.weights()[name] - before[name], 2)
        assert 0.1 < moved.max() <= 0.5 * 1.01
    factors = 4 * SIZES["tiny"].layers * run.rank() * (8 * 16 + 3 * (16 + 48))
    assert method.bytes()["factors"] == factors
    assert method.bytes()["bases"] == 0
    assert run.sent_bytes() == factors + 4 * SIZES["tiny"].rest()


def test_spectron_starts_at_the_best_approximation():
    weight = normal(0, 2, 8, 6)
    b, a = best_factors(weight, 3)
    assert_within(spectral_norm(weight - b @ a)[:, 0, 0], torch.linalg.svdvals(weight)[:, 3], 1e-9)
    assert_within(b.mT @ b, a @ a.mT, 1e-9)


def test_muon_of_torch_takes_a_fifth_of_the_step_of_ours(job):
    ours = make_method(job, replace(Run("tiny", "full", optimizer="muon"), lr=0.01))
    of_torch = make_method(job, replace(Run("tiny", "torch_muon"), lr=0.05))
    tokens = job.batch(0, 0)
    before = {name: leaf.clone() for name, leaf in ours.weights().items()}
    _, grads = job.gradients(before, tokens)
    for method in (ours, of_torch):
        method.update(0, grads, tokens, 1.0)
    for name in filter(is_inner, before):
        wanted = ours.weights()[name] - before[name]
        found = of_torch.weights()[name] - before[name]
        # torch orthogonalizes in bfloat16, which moves the smallest singular values. A wrong scale would be far off.
        assert (found - wanted).norm() < 0.1 * wanted.norm()


def test_settings_without_an_effect_or_a_result_are_refused():
    with pytest.raises(ValueError, match="needs a residual"):
        Run("tiny", "full", base="nf4")
    for method, setting in [
        ("full", {"factors": "bfloat16"}),
        ("full", {"coupled": 1}),
        ("galore", {"moments": "8bit"}),
        ("torch_muon", {"optimizer": "muon"}),
        ("spectron", {"base": "int8+bfloat16"}),
    ]:
        with pytest.raises(ValueError, match=f"'{method}' does not use {next(iter(setting))}"):
            Run("tiny", method, **setting)


def test_the_test_text_is_another_one(job):
    assert job.held_out("validation") is job.corpus.validation
    sources = bytes(job.held_out("test").numpy()).decode()
    assert Path(torch.nn.__file__).read_text() in sources
    weights = make_method(job, Run("tiny", "full")).weights()
    assert job.held_out_loss(weights, "test") != job.held_out_loss(weights, "validation")


def test_a_compensated_step_sends_the_dense_gradients():
    full, plain = Run("small", "full").sent_bytes(), Run("small", "switchlora").sent_bytes()
    compensated = Run("small", "switchlora", compensate=0.1)
    assert compensated.sent_bytes() == full
    assert replace(compensated, compensate_every=4).sent_bytes() == round(full / 4 + plain * 3 / 4)
    assert replace(compensated, reduced="int8").sent_bytes() == plain + SIZES["small"].parameters()


def test_the_rate_warms_up_and_falls_to_a_tenth():
    rates = [warmup_cosine(step, 100, 5) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert sorted(rates[5:], reverse=True) == rates[5:]
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_random_rows_are_idle_and_distinct():
    params = {"w": low_rank(Shape(8, 12, 3), (2,), base_dtype=torch.float32, factor_dtype=torch.float32)}
    pool = dl.switching.init_pool(params)
    plan = dl.schedules.every(1, count=3)(0, params)
    drawn = study_schedules.at_random(plan, pool, torch.Generator().manual_seed(0))["w"]
    for side, in_use in ((drawn.b, pool["w"].b.held), (drawn.a, pool["w"].a.held)):
        for rows, used_rows in zip(side.indices, in_use, strict=True):
            assert len(set(rows.tolist())) == 3
            assert set(rows.tolist()).isdisjoint(used_rows.tolist())


def test_a_rate_with_an_end_switches_nothing_afterwards():
    run = Run("small", "switchlora", ratio=0.0, until=0.5)
    params = {"w": low_rank(Shape(64, 64, 16), base_dtype=torch.float32, factor_dtype=torch.float32)}
    schedule, steps = study_schedules.schedule_of(run, params), SIZES["small"].steps
    switched = [schedule.switches(step, params) for step in range(steps)]
    assert sum(switched) == 2 * (16 * steps // 2 // 40)
    assert not any(switched[steps // 2 :])
