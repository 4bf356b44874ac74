"""Prepare a run: corpus, model, method, folder, and the state to resume from."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from torch import nn

import dynlora_fn as dl
from models import corpus as text
from models import llama
from models.pretrain.checkpoint import load_checkpoint
from models.pretrain.checks import check
from models.pretrain.config import Config, Data
from models.pretrain.device import run_device
from models.pretrain.folder import prepare_folder, run_folder
from models.pretrain.method import Method, State, make_method
from models.pretrain.processes import SINGLE_PROCESS, Processes

Export = Callable[[dict[str, Any]], None]  # writes the final parameters into the folder


class Saved(NamedTuple):
    """Everything that a resumed run needs.

    Batches depend only on the seed and the step.
    """

    state: State
    pool: dict[str, dl.switching.Pool]


class Prepared(NamedTuple):
    """A run that is ready to train."""

    config: Config
    processes: Processes
    folder: Path
    corpus: text.Corpus
    model: nn.Module
    method: Method
    saved: Saved
    first_step: int
    export: Export


def prepare(config: Config, console: Console, processes: Processes = SINGLE_PROCESS) -> Prepared:
    """Do everything up to the first step.

    All input is checked before anything is written.

    Raises:
        ValueError: If the input is invalid, in one line.
    """
    check(config, processes)
    corpus = load_corpus(config.data)
    name, seed = config.training.model, config.training.seed
    model = llama.init_weights(llama.Llama(llama.config(name, corpus.vocabulary)), seed).to(run_device(config))
    method = make_method(config, model, processes=processes)
    folder = Path(processes.from_first(run_folder(config)))

    def export(params: dict[str, Any]) -> None:
        description = {"name": name, "vocabulary": corpus.vocabulary}
        # A single entry: safetensors does not fix the order of several, and equal runs must write equal files.
        metadata = {"llama": json.dumps(description)}
        dl.interop.save_weights(dl.state_dict(model, params), folder / "model.safetensors", metadata=metadata)

    return start_or_resume(config, processes, folder, corpus, model, method, export, console)


def load_corpus(data: Data) -> text.Corpus:
    if data.dataset:
        documents = text.dataset(
            data.dataset, config=data.dataset_config, column=data.text_column, characters=data.dataset_characters
        )
    else:
        documents = text.split(text.text_files(data.text) if data.text else text.standard_library())
    tokenizer = text.pretrained_tokenizer(data.tokenizer) if data.tokenizer else text.byte_tokenizer()
    return text.tokenize(documents, tokenizer, window=data.seq_len + 1)


def start_or_resume(
    config: Config,
    processes: Processes,
    folder: Path,
    corpus: text.Corpus,
    model: nn.Module,
    method: Method,
    export: Export,
    console: Console,
    *,
    digests: Mapping[str, str] | None = None,
) -> Prepared:
    """Create the folder of a new run, or load a checkpoint of a resumed one.

    It is the newest that is not damaged. `digests` names hashes of further inputs, which a resumed run must have too.

    Raises:
        ValueError: On every process, if the folder does not fit the options or all checkpoints are damaged.
    """
    error = None
    if processes.is_first:
        try:
            prepare_folder(config, folder, {"corpus": corpus.digest(), **(digests or {})})
        except ValueError as raised:
            error = raised
    if error := processes.from_first(error):
        raise error
    saved, first_step = Saved(method.state, method.pool), 0
    resume = config.output.resume
    if resume and (loaded := load_checkpoint(folder / "checkpoints", saved, processes, donate=True)):
        saved, first_step = loaded.state, loaded.step
        for reason in loaded.refused:
            console.print(f"refused a damaged checkpoint: {reason}", soft_wrap=True, highlight=False)
    status = "continuing after" if resume else "starting at"
    console.print(f"{folder}: {status} step {first_step}", highlight=False, soft_wrap=True)
    return Prepared(config, processes, folder, corpus, model, method, saved, first_step, export)
