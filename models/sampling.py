"""Continue a sequence of tokens by drawing from a model's predictions.

A cache of keys and values lets each call compute only the new tokens.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.llama import Llama

Decoder = Callable[[Tensor], Tensor]
"""A function from tokens (1, length), which follow the tokens of earlier calls, to logits (1, length, vocabulary)."""


_CACHE_NAMES = ("cache", "past_key_values")  # of the argument and of the result; one of them in each `transformers`


class Sampling(NamedTuple):
    """The settings with which tokens are drawn."""

    tokens: int = 200  # the largest number of tokens to draw
    temperature: float = 0.8  # divides the logits; 0 takes the most probable token each time
    top_p: float = 0.95  # draw only from the most probable tokens that together have this probability; at least one
    seed: int = 0


def new_decoder(model: nn.Module, call: Callable[..., Any]) -> Decoder:
    """Return a decoder that has seen no tokens.

    Args:
        model: A `Llama`, or a causal language model of `transformers`.
        call: A function with the arguments and the result of the model, such as the model itself.
    """
    if isinstance(model, Llama):
        layers = model.new_cache()
        return lambda tokens: call(tokens, layers)
    parameters = inspect.signature(model.forward).parameters
    name = next((name for name in _CACHE_NAMES if name in parameters), None)
    return _decoder_without_cache(call) if name is None else _decoder_with_cache(name, call)


def _decoder_with_cache(name: str, call: Callable[..., Any]) -> Decoder:
    cache = None
    before: list[Tensor] = []  # for models that return no cache, such as an encoder with a head

    def decode(tokens: Tensor) -> Tensor:
        nonlocal cache
        before.append(tokens)
        given = torch.cat(before, dim=-1) if cache is None else tokens
        output = call(given, **{name: cache}, use_cache=True)
        cache = getattr(output, name, None)
        logits: Tensor = output.logits
        return logits[:, -tokens.shape[-1] :]

    return decode


def _decoder_without_cache(call: Callable[..., Any]) -> Decoder:
    before: list[Tensor] = []

    def decode(tokens: Tensor) -> Tensor:
        before.append(tokens)
        logits: Tensor = call(torch.cat(before, dim=-1)).logits
        return logits[:, -tokens.shape[-1] :]

    return decode


@torch.no_grad()
def continue_tokens(
    start: Callable[[], Decoder], prompt: Sequence[int], sampling: Sampling, *, context: int, device: torch.device
) -> Iterator[int]:
    """Yield the tokens that follow a prompt. Equal arguments give equal tokens.

    The model sees at most the last `context` tokens. When there are more, it starts again from the last half of them,
    because the positions of all tokens change.

    Args:
        start: A function that returns a decoder that has seen no tokens.
        prompt: The tokens to continue, at least one.
        sampling: The settings with which tokens are drawn.
        context: The largest number of tokens that the model sees.
        device: The device of the model.

    Raises:
        ValueError: If the largest logit is not finite.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    window, decode, seen = list(prompt)[-context:], start(), 0
    for _ in range(sampling.tokens):
        if len(window) > context:
            window, decode, seen = window[-max(1, context // 2) :], start(), 0
        logits = decode(torch.tensor([window[seen:]], device=device))[0, -1]
        seen = len(window)
        token = draw(logits, sampling, generator)
        yield token
        window.append(token)


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return a token drawn from the softmax of logits (vocabulary,).

    It is one of the most probable tokens, up to the token at which their probabilities add up to `top_p`
    (arXiv:1904.09751).

    Raises:
        ValueError: If the largest logit is not finite.
    """
    logits = logits.double().cpu()
    largest = logits.max()
    if not largest.isfinite():
        raise ValueError(f"the model's logits must be finite, got {largest.item()}; its weights may be damaged")
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = ((logits - largest) / sampling.temperature).softmax(-1)
    probabilities, tokens = probabilities.sort(descending=True, stable=True)
    if sampling.top_p < 1:
        is_excluded = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        is_excluded[0] = False
        probabilities = probabilities.masked_fill(is_excluded, 0.0)
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])


def check_sampling(sampling: Sampling) -> None:
    """Check that each setting is in its range.

    Raises:
        ValueError: For the first invalid value. The message names the option, the requirement and the value.
    """
    if sampling.tokens < 1:
        raise ValueError(f"`tokens` must be at least 1, got {sampling.tokens}")
    if not 0 <= sampling.temperature < float("inf"):  # false for nan
        raise ValueError(f"`temperature` must be 0 or more and finite, got {sampling.temperature}")
    if not 0 <= sampling.top_p <= 1:
        raise ValueError(f"`top_p` must be between 0 and 1, got {sampling.top_p}")
    if not 0 <= sampling.seed < 2**63:
        raise ValueError(f"`seed` must be between 0 and 2**63 - 1, got {sampling.seed}")
