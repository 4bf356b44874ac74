"""Let the model continue a text while it trains."""

from functools import partial

import numpy as np
import torch

import dynlora_fn as dl
from models.pretrain.device import compute_dtype, run_device
from models.pretrain.method import State
from models.pretrain.prepared import Prepared
from models.sampling import Sampling, continue_tokens, new_decoder

_PROMPT_TOKENS = 16
_SAMPLING = Sampling(tokens=100)


def sample(run: Prepared, state: State) -> str:
    """Return the first validation tokens and their continuation, in one line.

    Tokens are drawn with a separate generator, so a sample does not change the results of the run. Collective: call it
    on every process, because each token all-gathers sharded bases.
    """
    device, dtype, context = run_device(run.config), compute_dtype(run.config), run.config.data.seq_len
    prompt = np.asarray(run.corpus.validation)[:_PROMPT_TOKENS].tolist()
    start = partial(new_decoder, run.model, partial(dl.call, run.model, state.params()))
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        # The end of a document does not end the sample, so that all processes take part in equally many collectives.
        try:
            added = list(continue_tokens(start, prompt, _SAMPLING, context=context, device=device))
        except ValueError as error:  # the next loss ends the run
            return f"no sample, because {error}"
    given, text = run.codec.decode(prompt), run.codec.decode([*prompt, *added])
    return f"{given!r} is continued by {text.removeprefix(given)!r}"
