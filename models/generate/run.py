"""Continue a text with a trained model."""

import sys
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Annotated

import torch
import tyro

from models.codec import Codec, codec
from models.pretrain.device import find_device
from models.sampling import Sampling, check_sampling, continue_tokens, new_decoder
from models.trained import check_tokens, open_trained


@dataclass(frozen=True)
class Options:
    """Continue a text with a trained model, up to the end of a document.

    The text is printed together with its continuation. Equal options print equal texts.
    """

    run: tyro.conf.Positional[Path]
    """Use the model of this run of models.pretrain or models.finetune, of this checkpoint, or in this model folder.
    A run has its final model, or the model of its newest checkpoint if the run has not ended."""
    prompt: str = ""
    """Continue this text. An empty text begins a new document."""
    tokens: Annotated[int, tyro.conf.arg(aliases=["--max-new-tokens"])] = 200
    """Add at most this many tokens."""
    temperature: float = 0.8
    """Divide the logits by this. Smaller values prefer probable tokens, and 0 takes the most probable one each time."""
    top_p: float = 0.95
    """Draw only from the most probable tokens that together have this probability. 1 draws from all tokens."""
    seed: int = 0
    """Draw tokens from this seed."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Compute on this device. The default is cuda where torch finds it, and cpu otherwise."""


def generate(options: Options) -> str:
    """Return the prompt with its continuation.

    Raises:
        ValueError: If an option is invalid, or the model cannot be read.
    """
    sampling = Sampling(options.tokens, options.temperature, options.top_p, options.seed)
    check_sampling(sampling)
    device = find_device("device", options.device)
    trained = open_trained(options.run, device)
    tokenizer = codec(trained.tokenizer)
    prompt = prompt_tokens(options.prompt, tokenizer)
    check_tokens(trained, max(prompt))
    if len(prompt) > trained.context:
        print(
            f"the prompt has {len(prompt):,} tokens; the model sees the last {trained.context:,}, as in its training",
            file=sys.stderr,
        )
    model = trained.model
    added = continue_tokens(lambda: new_decoder(model, model), prompt, sampling, context=trained.context, device=device)
    return tokenizer.decode([*prompt, *takewhile(lambda token: token != tokenizer.end, added)])


def prompt_tokens(text: str, tokenizer: Codec) -> list[int]:
    """Return the tokens of a text.

    An empty text becomes the end token, after which the model begins a new document.

    Raises:
        ValueError: If the text is empty and the tokenizer has no end token.
    """
    tokens = tokenizer.encode(text)
    if not tokens and tokenizer.end is None:
        raise ValueError("`prompt` must have a token, because the tokenizer has no end token to begin from; pass text")
    return tokens or [tokenizer.end or 0]
