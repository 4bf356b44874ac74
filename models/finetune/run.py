"""Prepare a model of `transformers` for the training loop of `models.pretrain`.

The results are files that other tools read.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn

import dynlora_fn as dl
from models.codec import codec
from models.finetune.config import Config, check
from models.pretrain.device import run_device
from models.pretrain.folder import run_folder
from models.pretrain.method import make_method
from models.pretrain.prepared import Prepared, load_corpus, start_or_resume
from models.pretrain.processes import SINGLE_PROCESS, Processes


def prepare(config: Config, console: Console, processes: Processes = SINGLE_PROCESS) -> Prepared:
    """Do everything up to the first step.

    All input is checked before anything is written.

    Raises:
        ValueError: If the input is invalid, in one line.
    """
    check(config, processes)
    name = config.training.model
    corpus = load_corpus(replace(config.data, tokenizer=config.data.tokenizer or name))
    model = load_model(name).to(run_device(config))
    embedded = model.get_input_embeddings().weight.shape[0]
    if corpus.vocabulary > embedded:
        raise ValueError(
            f"`tokenizer` must have at most as many tokens as the model embeds, {embedded}, got {corpus.vocabulary}"
        )
    folder = Path(processes.from_first(run_folder(config)))
    export = partial(export_files, config, model, folder, console)
    method = make_method(config, model, default_targets(model), partial(untrained_names, config), processes=processes)
    drop_values(model)
    tokenizer = codec(config.data.tokenizer or name)
    return start_or_resume(config, processes, folder, corpus, model, method, export, tokenizer, console)


def load_model(folder: str) -> nn.Module:
    """Load a causal language model.

    It is in evaluation mode: without dropout, a resumed run is exact.

    Raises:
        ValueError: If `transformers` is missing or cannot load the folder.
    """
    try:
        from transformers import AutoModelForCausalLM, logging  # noqa: PLC0415, an optional extra
    except ImportError as error:
        raise ValueError("`model` needs the extra `data`: pip install 'dynlora-fn[data]'") from error
    logging.disable_progress_bar()
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(Path(folder), local_files_only=True)
    except Exception as error:  # the library raises many types for files that are damaged or of another kind
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"`model` must hold a causal language model, got {folder!r}: {reason}") from error
    return model.eval()


def export_files(config: Config, model: nn.Module, folder: Path, console: Console, params: dict[str, Any]) -> None:
    """Write the merged model, the adapter, or both."""
    export, rank = config.output.export, config.output.adapter_rank
    if export != "adapter":
        dl.interop.save_merged(model, params, folder / "model")
    if export != "merged" and config.training.method != "full":
        original = load_model(config.training.model).state_dict()
        errors = dl.interop.save_adapter(model, params, folder / "adapter", original=original, rank=rank)
        worst = max(errors, key=errors.__getitem__)
        text = f"adapter/ misses {errors[worst]:.2%} of the change of {worst}, and less of every other weight's change"
        console.print(text, highlight=False, soft_wrap=True)


def untrained_names(config: Config, params: Mapping[str, Any]) -> list[str]:
    """Return the names of the full-rank tensors that are not trained."""
    full_rank = [name for name, param in params.items() if isinstance(param, Tensor)]
    return [] if config.training.train_rest or config.training.method == "full" else full_rank


def default_targets(model: nn.Module) -> list[str]:
    """Return the weights of all linear layers except the head, tied or not.

    Hugging Face's Conv1D counts as linear.
    """
    head = model.get_output_embeddings()
    layers = [(name, layer) for name, layer in model.named_modules() if layer is not head]
    return [
        f"{name}.weight" for name, layer in layers if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"
    ]


def drop_values(model: nn.Module) -> None:
    """Move the parameters to the meta device, in place.

    The state has their values, and a second copy would cost memory.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    replacements = {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        for parameter in parameters.values()
    }
    for name, parameter in parameters.items():
        prefix, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(prefix), attribute, replacements[id(parameter)])
