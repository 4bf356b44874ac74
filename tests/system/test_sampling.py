"""Drawing tokens from logits, and continuing a sequence with a cache."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import dynlora_fn as dl
from models import llama
from models.sampling import Sampling, continue_tokens, draw, new_decoder

LOGITS = torch.tensor([0.5, 0.05, 0.3, 0.15]).log()
GREEDY = Sampling(tokens=30, temperature=0)
CPU = torch.device("cpu")


def small_llama() -> llama.Llama:
    model = llama.init_weights(llama.Llama(llama.config("llama-tiny", vocabulary=50)), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # far from uniform predictions
    return model


def counts(sampling: Sampling, draws: int = 2000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens = [draw(LOGITS, sampling, generator) for _ in range(draws)]
    return torch.bincount(torch.tensor(tokens), minlength=4) / draws


@pytest.mark.parametrize(
    ("temperature", "top_p", "wanted"),
    [
        (1.0, 1.0, [0.5, 0.05, 0.3, 0.15]),
        (1.0, 0.79, [0.625, 0, 0.375, 0]),
        (1.0, 0.81, [0.5 / 0.95, 0, 0.3 / 0.95, 0.15 / 0.95]),
        (1.0, 0.0, [1, 0, 0, 0]),
        (0.0, 1.0, [1, 0, 0, 0]),
        (0.5, 1.0, [0.25 / 0.365, 0.0025 / 0.365, 0.09 / 0.365, 0.0225 / 0.365]),
        (1e-320, 1.0, [1, 0, 0, 0]),
    ],
)
def test_tokens_have_their_probabilities(temperature: float, top_p: float, wanted: list[float]):
    found = counts(Sampling(temperature=temperature, top_p=top_p))
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=found.dtype), rtol=0, atol=0.04)
    assert not found[torch.tensor(wanted) == 0].any()


def test_a_token_that_a_model_excludes_is_not_drawn():
    logits = torch.tensor([0.0, -torch.inf, 0.0])
    generator = torch.Generator().manual_seed(0)
    assert {draw(logits, Sampling(temperature=9, top_p=1), generator) for _ in range(100)} == {0, 2}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(value: float, temperature: float):
    with pytest.raises(ValueError, match=r"the model's logits must be finite, got (nan|inf)"):
        draw(torch.tensor([0.0, value]), Sampling(temperature=temperature), torch.Generator())


@pytest.mark.parametrize("lengths", [[30], [1] * 30, [7, 1, 22], [29, 1]])
def test_a_cache_gives_the_logits_of_the_sequence(lengths: list[int]):
    model = small_llama()
    params = dl.init(model, rank=4, seed=0, targets=llama.TARGETS)
    tokens = torch.arange(60).reshape(2, 30) % 50
    for call in (model, partial(dl.call, model, params)):
        cache = model.new_cache()
        parts = [call(part, cache) for part in tokens.split(lengths, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=0, atol=1e-5)
        assert {layer.length for layer in cache} == {30}


def continued(model, prompt: list[int], context: int, sampling: Sampling = GREEDY) -> list[int]:
    return list(continue_tokens(partial(new_decoder, model, model), prompt, sampling, context=context, device=CPU))


def most_probable(model, prompt: list[int], context: int, count: int) -> list[int]:
    """Return what follows without a cache."""
    window, added = prompt[-context:], []
    for _ in range(count):
        window = window if len(window) <= context else window[-max(1, context // 2) :]
        output = model(torch.tensor([window]))
        added.append(int(getattr(output, "logits", output)[0, -1].argmax()))
        window = [*window, added[-1]]
    return added


@pytest.mark.parametrize("context", [1, 2, 5, 16, 100])
def test_a_full_context_goes_on_from_its_half(context: int):
    model, prompt = small_llama(), list(range(20))
    assert continued(model, prompt, context) == most_probable(model, prompt, context, 30)


class WithoutCache(nn.Module):
    """Return only logits, as a model of `transformers` that has no cache by this name."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.model(tokens).logits)


class ReturnsNoCache(WithoutCache):
    """Take a cache and return none, as an encoder with a head for generation."""

    def forward(self, tokens: torch.Tensor, past_key_values: Any = None, use_cache: bool = False) -> SimpleNamespace:
        return SimpleNamespace(logits=self.model(tokens).logits, past_key_values=None)


@pytest.mark.parametrize("wrap", [lambda model: model, WithoutCache, ReturnsNoCache])
def test_a_model_of_transformers_is_continued_in_the_same_way(wrap):
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24, "initializer_range": 0.5}
    model = wrap(GPT2LMHeadModel(GPT2Config(vocab_size=50, bos_token_id=0, eos_token_id=0, **sizes)).eval())
    prompt = list(range(20))
    assert continued(model, prompt, 24) == most_probable(model, prompt, 24, 30)


def test_a_seed_gives_its_tokens():
    model = small_llama()
    first, again, other = (continued(model, [1, 2], 16, Sampling(tokens=30, seed=seed)) for seed in (4, 4, 5))
    assert first == again != other
    assert len(first) == 30


def test_the_global_generator_is_not_used():
    model, before = small_llama(), torch.get_rng_state()
    continued(model, [1], 16, Sampling(tokens=5))
    assert torch.equal(torch.get_rng_state(), before)
