"""One step of each method: the order of update and switch, and the decay of weights."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

import dynlora_fn as dl
from models import llama
from models.finetune.config import Config as FinetuneConfig
from models.pretrain.config import Config
from models.pretrain.method import Method, make_method
from models.pretrain.optimizer import make_optimizer

MODEL = llama.init_weights(llama.Llama(llama.config("llama-tiny", 64)), 0)
LR, STEPS = torch.tensor(1e-2), 4


def config(method: str, **options) -> Config:
    """Return a configuration without clipping."""
    base = Config()

    def group(defaults):
        return replace(defaults, **{key: value for key, value in options.items() if hasattr(defaults, key)})

    return replace(
        base,
        training=replace(base.training, method=method, rank=4, steps=STEPS),
        optimization=group(base.optimization),
        switching=group(base.switching),
        machine=replace(base.machine, device="cpu"),
    )


def tokens(step: int) -> torch.Tensor:
    return torch.randint(64, (1, 2, 17), generator=torch.Generator().manual_seed(step))


def weights_after(method: Method, steps: int = STEPS) -> dict[str, torch.Tensor]:
    state = method.state
    for step in range(steps):
        plan = method.schedule(step, state.params()) if method.schedule.switches(step, state.params()) else None
        state, _ = method.step(state, tokens(step), LR, plan, None, torch.tensor(0.0))
    return dl.materialize(state.params())


def distance(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    return max((left[name] - right[name]).abs().max().item() for name in left)


def test_a_merge_at_the_last_step_keeps_the_weights_of_lora():
    """Gradients belong to the factors of the forward pass, so the update comes before the merge."""
    lora = weights_after(make_method(config("lora"), MODEL))
    relora = make_method(config("relora", merge_every=STEPS), MODEL)
    assert relora.schedule.switches(STEPS - 1, relora.state.params())
    assert distance(weights_after(relora), lora) < 1e-5


def test_switches_without_a_freeze_come_after_the_update():
    frequent = make_method(config("switchlora", interval=2, ratio=100.0, freeze=0, optimizer="adamw"), MODEL)
    never = make_method(config("switchlora", interval=1e9, optimizer="adamw"), MODEL)
    assert frequent.schedule.switches(0, frequent.state.params())
    assert distance(weights_after(frequent, steps=1), weights_after(never, steps=1)) < 1e-5


def test_full_rank_training_decays_as_torch_does():
    theirs = llama.Llama(llama.config("llama-tiny", 64))
    theirs.load_state_dict(MODEL.state_dict())
    adamw = torch.optim.AdamW(theirs.parameters(), lr=LR.item(), weight_decay=0.3)
    for step in range(STEPS):
        (batch,) = tokens(step)
        cross_entropy(theirs(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
        adamw.step()
        adamw.zero_grad()
    ours = weights_after(make_method(config("full", weight_decay=0.3, clip=1e9), MODEL))
    named = dict(theirs.named_parameters())
    assert distance({name: param.detach() for name, param in named.items()}, dl.unstack(ours)) < 1e-4
    assert distance(ours, weights_after(make_method(config("full", clip=1e9), MODEL))) > 1e-3


def test_muon_has_moments_in_8_bit_where_all_have():
    settings = replace(Config(), precision=replace(Config().precision, moments="8bit"))
    assert settings.inner_optimizer() == "muon"
    factors = {"w": dl.Factors(torch.ones(512, 8), torch.ones(8, 512))}
    mu = make_optimizer(settings, frozenset(["w"]), MODEL).init(factors)["inner"].inner.mu
    assert all(isinstance(side, dl.optim.SignedMoment) for side in mu["w"])


@pytest.mark.parametrize("method", ["full", "switchlora"])
def test_embedding_and_head_have_the_optimizer_of_the_option(method: str):
    trained = make_method(config(method, dense_optimizer="scale"), MODEL)
    before = trained.state.params()
    state, _ = trained.step(trained.state, tokens(0), LR, None, None, torch.tensor(0.0))
    states = state.opt_state
    assert list(states["head"].inner.mu) == ["head.weight"]
    assert states["embedding"].inner.mu == {}
    assert all("norm" in name for name in states["rest"].inner.mu)
    change = state.params()["embedding.weight"] - before["embedding.weight"]  # columns of one length
    rate = LR * (16 if method == "switchlora" else 1)
    torch.testing.assert_close(change.square().mean(0).sqrt(), rate.expand(change.shape[1]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", ["full", "lora", "relora", "switchlora"])
def test_every_method_decays_weights_and_not_only_factors(method: str):
    settings = config(method, weight_decay=0.5)
    state = make_method(settings, MODEL).state
    params = state.params()
    inner = frozenset(name for name, param in params.items() if isinstance(param, dl.LowRank))
    decayed = dl.materialize(make_optimizer(settings, inner, MODEL).decay(params, state.trainable, LR))
    # The option `dense_lr` is 16 times `lr` beside muon.
    scales = {name: 1.0 if name in inner or method != "switchlora" else 16.0 for name in params}
    for name, weight in dl.materialize(params).items():
        torch.testing.assert_close(decayed[name], weight * (1 - 0.5e-2 * scales[name]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("method", "is_of_weights"), [("full", True), ("lora", False), ("switchlora", False)])
def test_fine_tuning_decays_factors(method: str, is_of_weights: bool):
    """A decay of low-rank weights would pull the given model to zero."""
    base = FinetuneConfig()
    settings = replace(
        base,
        training=replace(base.training, method=method, rank=4),
        optimization=replace(base.optimization, weight_decay=0.5, warmup=0),
        machine=replace(base.machine, device="cpu"),
    )
    state = make_method(settings, MODEL).state
    params, optimizer = state.params(), make_optimizer(settings, frozenset(state.trainable), MODEL)
    decayed = optimizer.decay(params, state.trainable, LR)
    assert (distance(dl.materialize(decayed), dl.materialize(params)) > 0) == is_of_weights
