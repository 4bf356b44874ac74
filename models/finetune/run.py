"""Prepare a model of `transformers` for the training loop of `models.pretrain`.

At its end the run writes files for `transformers` and PEFT.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from models.codec import codec
from models.corpus import load_tokenizer
from models.finetune.config import Config, check
from models.finetune.export import Export
from models.finetune.load import check_on_tokens, load_model, reason
from models.finetune.model_folder import check_tokenizer_folder, digest
from models.finetune.parameters import drop_values
from models.pretrain.device import run_device
from models.pretrain.folder import check_folder as check_run_folder
from models.pretrain.folder import run_folder
from models.pretrain.method import make_method
from models.pretrain.prepared import Prepared, start_or_resume
from models.pretrain.processes import SINGLE_PROCESS, Processes
from models.pretrain.reading import load_corpus, tokens_beside, tokens_of_resumed


def prepare(config: Config, console: Console, processes: Processes = SINGLE_PROCESS) -> Prepared:
    """Do everything up to the first step.

    All input is checked before the folder of the run is created or changed.

    Raises:
        ValueError: If the input is invalid. The message is one line.
        OSError: If a file cannot be read or written. The error names the file.
    """
    check(config, processes)
    folder = Path(processes.from_first(run_folder(config)))
    processes.do_on_first(lambda: check_run_folder(config, folder))
    name = config.training.model
    tokenizer_name = config.tokenizer()
    check_tokenizer_folder(Path(tokenizer_name))
    model, tokenizer = load_model(name), load_tokenizer(tokenizer_name)
    check_tokens(tokenizer, model, config.data.seq_len)
    if config.output.export != "adapter":
        processes.do_on_first(lambda: check_can_be_saved(model, tokenizer))
    model = model.to(run_device(config))
    model_digest = processes.do_on_first(lambda: digest(Path(name)))
    with tokens_beside(folder, processes) as tokens:
        data, stored = replace(config.data, tokenizer=tokenizer_name), tokens_of_resumed(config, folder)
        corpus = load_corpus(data, tokens, console, processes, stored=stored)
        export = Export(config, model, model_digest, tokenizer, corpus, folder, console)
        rest = partial(untrained_names, config)
        method = make_method(config, model, default_targets(model), rest, processes=processes)
        drop_values(model)
        digests = {"model_digest": model_digest}
        return start_or_resume(
            config, processes, folder, corpus, model, method, export, codec(tokenizer_name), console, digests=digests
        )


def check_tokens(tokenizer: Any, model: nn.Module, seq_len: int) -> None:
    """Check that the model takes all tokens of the tokenizer.

    The model is also checked with `check_on_tokens`, and must be on the CPU.

    Raises:
        ValueError: As `check_on_tokens`, or if the tokenizer has more tokens than the model embeds.
    """
    vocabulary = embedded_tokens(model)
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= vocabulary:
        raise ValueError(
            f"`tokenizer` must have at most as many tokens as the model embeds, {vocabulary}, got {largest + 1}"
        )
    check_on_tokens(model, vocabulary, seq_len)


def check_can_be_saved(model: Any, tokenizer: Any) -> None:
    """Check that `transformers` can write the configurations after the training.

    Raises:
        ValueError: If it does not.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder, state_dict={})
            tokenizer.save_pretrained(folder)
        except Exception as error:  # of many types
            raise ValueError(
                f"`model` must be one that `save_pretrained` can write, got {type(model).__name__}: {reason(error)}"
            ) from error


def embedded_tokens(model: nn.Module) -> int:
    """Return the number of tokens that the model can both embed and predict."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return min(layer.weight.shape[0] for layer in layers if layer is not None)


def untrained_names(config: Config, params: Mapping[str, Any]) -> list[str]:
    """Return the names of the full-rank tensors to freeze."""
    full_rank = [name for name, param in params.items() if isinstance(param, Tensor)]
    return [] if config.training.train_rest or config.training.method == "full" else full_rank


def default_targets(model: nn.Module) -> list[str]:
    """Return the names of the weights of all linear layers except the head.

    `Conv1D` of `transformers` counts as a linear layer. The head is left out whether it is tied or not.
    """
    head = model.get_output_embeddings()
    layers = [(name, layer) for name, layer in model.named_modules() if layer is not head]
    return [
        f"{name}.weight" for name, layer in layers if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"
    ]
