"""The pre-training job's loop on a model that comes from a folder, and goes out as files that other tools read."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn

import dynlora_fn as dl
from models.finetune.config import Config
from models.pretrain.method import make_method
from models.pretrain.ranks import ALONE, Ranks
from models.pretrain.run import Prepared, load_corpus, start_or_continue


def prepare(config: Config, console: Console, ranks: Ranks = ALONE) -> Prepared:
    """Everything up to the first step. All bad input shows here, before anything is written.

    Raises:
        ValueError: with one line that names the setting, the rule and the value.
    """
    config.check(ranks)
    corpus = load_corpus(replace(config, tokenizer=config.tokenizer or config.model))
    model = load_model(config.model).to(config.torch_device())
    embedded = model.get_input_embeddings().weight.shape[0]
    if corpus.vocabulary > embedded:
        raise ValueError(f"`tokenizer` must fit the model's vocabulary of {embedded}, got one of {corpus.vocabulary}")
    folder = Path(ranks.agree(config.folder()))

    def export(params: dict[str, Any]) -> None:
        if config.export != "adapter":
            dl.interop.save_merged(model, params, folder / "model")
        if config.export != "merged" and config.method != "full":
            original = load_model(config.model).state_dict()
            errors = dl.interop.save_adapter(
                model, params, folder / "adapter", original=original, rank=config.adapter_rank
            )
            worst = max(errors, key=errors.__getitem__)
            text = f"adapter/ has all but {errors[worst]:.2%} of the change of {worst}, and more of the others'"
            console.print(text, highlight=False, soft_wrap=True)

    method = make_method(config, model, default_targets(model), partial(still, config), ranks=ranks)
    empty(model)
    return start_or_continue(config, ranks, folder, corpus, model, method, export, console)


def load_model(folder: str) -> nn.Module:
    try:
        from transformers import AutoModelForCausalLM, logging  # noqa: PLC0415, an optional extra
    except ImportError as error:
        raise ValueError("`model` needs the extra `data`: pip install 'dynlora-fn[data]'") from error
    logging.disable_progress_bar()
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(Path(folder), local_files_only=True)
    except Exception as error:  # whatever the library raises for files that are damaged or of another kind
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"`model` must hold a causal language model, got {folder!r}: {reason}") from error
    return model.eval()  # no dropout, so that a run goes on bit for bit


def still(config: Config, params: Mapping[str, Any]) -> list[str]:
    """What is neither low-rank nor trained."""
    rest = [name for name, param in params.items() if isinstance(param, Tensor)]
    return [] if config.train_rest or config.method == "full" else rest


def default_targets(model: nn.Module) -> list[str]:
    """The weights of all linear layers, Hugging Face's Conv1D among them, but for the head, tied or not."""
    head = model.get_output_embeddings()
    layers = [(name, layer) for name, layer in model.named_modules() if layer is not head]
    return [
        f"{name}.weight" for name, layer in layers if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"
    ]


def empty(model: nn.Module) -> None:
    """Leaves the parameters' shapes alone, in place: their values are in the state, and would be held twice."""
    own = dict(model.named_parameters(remove_duplicate=False))
    replaced = {id(parameter): nn.Parameter(parameter.detach().to("meta")) for parameter in own.values()}
    for name, parameter in own.items():
        prefix, _, last = name.rpartition(".")
        setattr(model.get_submodule(prefix), last, replaced[id(parameter)])
