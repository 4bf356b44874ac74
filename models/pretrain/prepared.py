"""Prepare a run: text, model, method, folder, and the state to resume from."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from torch import Tensor, nn

import dynlora_fn as dl
from models import corpus as text
from models import hugging_face, llama
from models.codec import Codec, codec
from models.pretrain.checkpoint import load_checkpoint
from models.pretrain.checks import check
from models.pretrain.compiling import announcement, count_parameters, with_choice
from models.pretrain.config import Config
from models.pretrain.device import run_device
from models.pretrain.folder import (
    check_folder,
    check_metrics,
    checkpoint_settings,
    prepare_folder,
    run_folder,
    write_record,
)
from models.pretrain.learning_rate import change_of_steps
from models.pretrain.method import Method, State, make_method
from models.pretrain.processes import SINGLE_PROCESS, Processes
from models.pretrain.reading import load_corpus, tokens_beside, tokens_of_resumed

Export = Callable[[dict[str, Any]], None]  # a function that writes the final parameters into the folder


class Saved(NamedTuple):
    """The content of a checkpoint.

    A resumed run needs nothing else, because batches depend only on the seed and the step.
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
    codec: Codec
    settings: dict[str, object]  # options that must be the same in a checkpoint and in the resumed run


def prepare(config: Config, console: Console, processes: Processes = SINGLE_PROCESS) -> Prepared:
    """Do everything up to the first step.

    All input is checked before the folder of the run is created or changed.

    Raises:
        ValueError: If the input is invalid. The message is one line.
        OSError: If a file cannot be read or written. The error names the file.
    """
    check(config, processes)
    name, seed = config.training.model, config.training.seed
    llama.config(name)  # raises for an unknown name
    folder = Path(processes.from_first(run_folder(config)))
    processes.do_on_first(lambda: check_folder(config, folder))
    with tokens_beside(folder, processes) as tokens:
        corpus = load_corpus(config.data, tokens, console, processes, stored=tokens_of_resumed(config, folder))
        model = llama.init_weights(llama.Llama(llama.config(name, corpus.vocabulary)), seed).to(run_device(config))
        method = make_method(config, model, processes=processes)
        tokenizer = codec(config.tokenizer())

        def export(params: dict[str, Any]) -> None:
            description = {"name": name, "vocabulary": corpus.vocabulary}
            # This is a single entry, because safetensors does not fix the order of several entries, and equal runs must
            # write equal files.
            metadata = {"llama": json.dumps(description)}
            weights = dl.state_dict(model, params)
            dl.interop.save_weights(weights, folder / "model.safetensors", metadata=metadata)
            save_pretrained(config, model.config, weights, tokenizer, folder / "model")

        return start_or_resume(config, processes, folder, corpus, model, method, export, tokenizer, console)


def save_pretrained(
    config: Config, architecture: llama.LlamaConfig, weights: Mapping[str, Tensor], tokenizer: Codec, folder: Path
) -> None:
    """Write a model folder for `transformers`.

    `LlamaForCausalLM.from_pretrained` loads the model from it, and `AutoTokenizer.from_pretrained` the tokenizer.
    """
    file = folder / "model.safetensors"
    dl.interop.save_weights(hugging_face.renamed(weights), file, metadata={"format": "pt"})
    hugging_face.save_config(architecture, folder, seq_len=config.data.seq_len, end=tokenizer.end)
    tokenizer.save(folder)


def start_or_resume(
    config: Config,
    processes: Processes,
    folder: Path,
    corpus: text.Corpus,
    model: nn.Module,
    method: Method,
    export: Export,
    tokenizer: Codec,
    console: Console,
    *,
    digests: Mapping[str, str] | None = None,
) -> Prepared:
    """Create the folder of a new run, or load the newest undamaged checkpoint.

    Args:
        config: The options.
        processes: The processes of the run.
        folder: The folder of the run.
        corpus: The tokens of the text.
        model: The module.
        method: The method with its initial state.
        export: A function that writes the final parameters into the folder.
        tokenizer: The tokenizer of the text.
        console: The console that shows the progress.
        digests: Hashes of further inputs by name. A resumed run must have the same hashes.

    Raises:
        ValueError: On every process, if the folder does not fit the options, or if all checkpoints are refused.
        OSError: On every process, if the folder cannot be read or written.
    """
    count, world_size = count_parameters(method.state.params()), processes.world_size
    if not config.output.resume:
        config = with_choice(config, count, world_size)
    digests = {"corpus": corpus.digest(), **(digests or {})}
    recorded_steps = processes.do_on_first(lambda: prepare_folder(config, folder, digests))
    saved, first_step = Saved(method.state, method.pool), 0
    resume, steps = config.output.resume, config.training.steps
    settings = checkpoint_settings(config, digests)
    if resume and (loaded := load_checkpoint(folder / "checkpoints", saved, processes, settings=settings, donate=True)):
        saved, first_step = loaded.state, loaded.step
        for path, reason, is_damaged in loaded.refused:
            kind = "a damaged checkpoint" if is_damaged else "a checkpoint"
            console.print(f"refused {kind}: {path}: {reason}", soft_wrap=True, highlight=False, markup=False)
    if first_step > steps:
        raise ValueError(
            f"`steps` must be at least the step of the checkpoint in {str(folder)!r}, {first_step}, got {steps}"
        )
    if resume:
        processes.do_on_first(lambda: check_metrics(folder / "metrics.jsonl", first_step, steps))
        processes.do_on_first(lambda: write_record(config, folder, digests))
    status = "continuing after" if resume else "starting at"
    console.print(f"{folder}: {status} step {first_step}", highlight=False, soft_wrap=True, markup=False)
    console.print(announcement(config, count, world_size), highlight=False, soft_wrap=True, markup=False)
    if recorded_steps != steps:
        console.print(change_of_steps(config, recorded_steps, first_step), highlight=False, soft_wrap=True)
    return Prepared(config, processes, folder, corpus, model, method, saved, first_step, export, tokenizer, settings)
