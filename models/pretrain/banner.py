"""Show text, model, method and machine of a run before its first step."""

from collections.abc import Iterator

import torch
from rich.console import Console
from rich.table import Table

import dynlora_fn as dl
from models.corpus.tokens import Counted
from models.llama import LlamaConfig
from models.pretrain.config import Config
from models.pretrain.device import run_device
from models.pretrain.learning_rate import dense_lr_scale, peak_lr
from models.pretrain.prepared import Prepared
from models.pretrain.recorder import wire_bytes
from models.pretrain.report import size, sizes

_COUNTED_STEPS = 5_000  # the most steps whose switches are counted, which limits the time for it


def show(run: Prepared, console: Console) -> None:
    """Print text, model, method and machine of a run, and warn if it switches nothing."""
    table = Table.grid(padding=(0, 2))
    for label, content in _rows(run):
        table.add_row(label, content)
    console.print(table, highlight=False, markup=False)
    config, counted = run.config, range(min(run.config.training.steps, _COUNTED_STEPS))
    if config.training.method in ("switchlora", "relora"):
        params = run.method.state.params()
        count = sum(run.method.schedule.switches(step, params) for step in counted)
        when = "in all" if len(counted) == config.training.steps else f"in the first {len(counted):,} steps"
        if count:
            console.print(f"switches   {count:,} vectors {when}", highlight=False)
        else:
            option = "--merge-every" if config.training.method == "relora" else "--interval"
            console.print(f"warning: 0 vectors are switched {when}; use a smaller {option}", highlight=False)


def _rows(run: Prepared) -> Iterator[tuple[str, str]]:
    config, corpus = run.config, run.corpus
    train, validation = corpus.counted["train"], corpus.counted["validation"]
    count = size(train.text_bytes + validation.text_bytes)
    yield "text", f"{source(config)}: {count}, {_documents(train)} to train on, {_documents(validation)} for validation"
    tokens, held_out = len(corpus.train), len(corpus.validation)
    share = held_out / (tokens + held_out)
    yield (
        "tokens",
        f"{tokens:,} to train on, {held_out:,} ({share:.1%}) for validation, {config.tokenizer() or 'bytes'}",
    )
    data, steps = config.data, config.training.steps
    read = steps * data.grad_accum * data.batch_size * data.seq_len
    yield "steps", f"{steps:,} of {read // steps:,} tokens: {read:,} tokens, {read / tokens:.2g} passes over the text"
    counts = sizes(run.method, wire_bytes(run))
    trained = f"{counts['trainable']:,} trained ({counts['trainable_share']:.1%})"
    yield "model", f"{config.training.model}: {counts['parameters']:,} parameters, {trained}"
    yield "method", _method(run)
    lr = peak_lr(config)
    has_scale = config.optimization.dense_optimizer == "scale"
    kinds = "embedding and head scale, norms adamw" if has_scale else "embedding, head and norms adamw"
    dense = f"{kinds}, rate {lr * dense_lr_scale(config):.3g}"
    rates = f"{config.inner_optimizer()}, rate {lr:.3g}; {dense}"
    yield "optimizer", f"{rates}; {config.optimization.warmup} steps of warm-up"
    yield "machine", _machine(run, sum(counts["bytes"].values()))


def _documents(counted: Counted) -> str:
    return f"{counted.documents:,} documents" if counted.documents != 1 else "1 document"


def source(config: Config) -> str:
    """Return the names of the texts or of the dataset in the options."""
    data = config.data
    if data.dataset:
        return data.dataset
    return ", ".join(map(str, data.text[:3])) + ", ..." * (len(data.text) > 3) or "Python's standard library"


def _method(run: Prepared) -> str:
    method = run.config.training.method
    low_rank = [param for param in run.method.state.params().values() if isinstance(param, dl.LowRank)]
    if not low_rank:
        return method
    count = sum(param.seed.numel() for param in low_rank)
    base = run.config.precision.base_dtype
    factors = "only b trained, " if run.config.trained() == "b" else ""
    return f"{method}, rank {run.config.rank()}, {factors}{count} low-rank weights, bases in {base}"


def _machine(run: Prepared, state_bytes: int) -> str:
    config, world_size = run.config, run.processes.world_size
    count = torch.get_num_threads()
    threads = f", {count} thread{'s' * (count > 1)}" if run_device(config).type == "cpu" else ""
    processes = f", {world_size} processes" if world_size > 1 else ""
    # The state counts twice, because there is a copy of it while a checkpoint is written.
    memory = f"about {size(2 * state_bytes + _activations(run))} for state, checkpoint and activations"
    return f"{config.machine.device}{threads}{processes}; {memory}"


def _activations(run: Prepared) -> int:
    """Estimate how many bytes of activations a backward pass stores.

    The estimate is 0 for a model of another library.
    """
    model = getattr(run.model, "config", None)
    if not isinstance(model, LlamaConfig):
        return 0
    tokens = run.config.data.batch_size * run.config.data.seq_len // run.processes.world_size
    return 4 * tokens * (model.layers * (12 * model.width + 5 * model.hidden) + 3 * model.vocabulary)
