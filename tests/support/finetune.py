"""The fine-tuning job on small models: what it is given, and its settings."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

TEXT = "the quick brown fox jumps over the lazy dog and runs away from it\n" * 200
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


class Given(NamedTuple):
    """A model with its tokenizer, and a text."""

    model: Path
    text: Path


def llama(**options: Any) -> Any:
    import transformers  # noqa: PLC0415, takes seconds

    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=128, **SIZES, **options)).eval()


def save_given(model: Any, folder: Path) -> Given:
    """Write a model of 128 tokens with a tokenizer of characters, and a text."""
    import tokenizers  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    model.save_pretrained(folder / "model")
    vocabulary = {chr(code): code for code in range(128)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    return Given(folder / "model", folder / "text.txt")


def settings(given: Given, out: Path, **changed: object) -> list[str]:
    """Return the arguments of a short job. A value True is a flag."""
    chosen: dict[str, object] = {"model": given.model, "text": given.text, "out": out, "rank": 4, "steps": 20}
    chosen |= {"seq-len": 16, "batch-size": 4, "lr": 1e-2, "warmup": 2, "eval-every": 10, "eval-batches": 2}
    chosen |= {"save-every": 10, "interval": 10, "device": "cpu", **changed}
    pairs = ((f"--{name}",) if value is True else (f"--{name}", value) for name, value in chosen.items())
    return [str(part) for pair in pairs for part in pair]
