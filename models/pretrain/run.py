"""The training loop: batches in, metrics and checkpoints out, the merged model at the end."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

import dynlora_fn as dl
from models import corpus as text
from models import llama
from models.pretrain.checkpoint import Saver, load_checkpoint
from models.pretrain.config import Config, prepare_folder
from models.pretrain.method import Method, State, make_method, next_token_loss
from models.pretrain.ranks import ALONE, Preemption, Ranks
from models.pretrain.recorder import Recorder, wire_bytes
from models.pretrain.report import plot, read_metrics, sizes


class Saved(NamedTuple):
    """All that a continued run starts from; batches depend on nothing but the seed and the step."""

    state: State
    pool: dict[str, dl.switching.Pool]


class Prepared(NamedTuple):
    config: Config
    ranks: Ranks
    folder: Path
    corpus: text.Corpus
    model: nn.Module
    method: Method
    saved: Saved
    first_step: int
    export: Callable[[dict[str, Any]], None]  # of the parameters at the end, into the folder


def prepare(config: Config, console: Console, ranks: Ranks = ALONE) -> Prepared:
    """Everything up to the first step. All bad input shows here, before anything is written.

    Raises:
        ValueError: with one line that names the setting, the rule and the value.
    """
    config.check(ranks)
    corpus = load_corpus(config)
    model = llama.Llama(llama.config(config.model, corpus.vocabulary))
    method = make_method(config, llama.init_weights(model, config.seed).to(config.torch_device()), ranks=ranks)
    folder = Path(ranks.agree(config.folder()))

    def export(params: dict[str, Any]) -> None:
        described = {"name": config.model, "vocabulary": corpus.vocabulary}
        # One entry: the order of several is not fixed, and equal runs write equal files.
        metadata = {"llama": json.dumps(described)}
        dl.interop.save_weights(dl.state_dict(model, params), folder / "model.safetensors", metadata=metadata)

    return start_or_continue(config, ranks, folder, corpus, model, method, export, console)


def start_or_continue(
    config: Config,
    ranks: Ranks,
    folder: Path,
    corpus: text.Corpus,
    model: nn.Module,
    method: Method,
    export: Callable[[dict[str, Any]], None],
    console: Console,
) -> Prepared:
    """Makes the folder of a new run, or takes a resumed one up from its newest good checkpoint."""
    problem = None
    if ranks.is_first:
        try:
            prepare_folder(config, folder, corpus.digest())
        except ValueError as error:
            problem = error
    if problem := ranks.agree(problem):
        raise problem
    saved, first_step = Saved(method.state, method.pool), 0
    if config.resume and (loaded := load_checkpoint(folder / "checkpoints", saved, ranks)):
        saved, first_step = loaded.state, loaded.step
        for reason in loaded.refused:
            console.print(f"refused a damaged checkpoint: {reason}", soft_wrap=True, highlight=False)
    state = "continuing after" if config.resume else "starting at"
    console.print(f"{folder}: {state} step {first_step}", highlight=False, soft_wrap=True)
    return Prepared(config, ranks, folder, corpus, model, method, saved, first_step, export)


def load_corpus(config: Config) -> text.Corpus:
    if config.dataset:
        documents = text.dataset(
            config.dataset,
            config=config.dataset_config,
            column=config.text_column,
            characters=config.dataset_characters,
        )
    else:
        documents = text.split(text.text_files(config.text) if config.text else text.standard_library())
    tokenizer = text.pretrained_tokenizer(config.tokenizer) if config.tokenizer else text.byte_tokenizer()
    return text.tokenize(documents, tokenizer, window=config.seq_len + 1)


def train(run: Prepared, console: Console) -> dict[str, Any] | None:
    """Trains to the last step and returns the summary; or saves and returns None once SIGTERM asks it to end.

    Raises:
        DivergedError: if the loss or the gradient is no longer finite; the last good checkpoint stays.
        DriftedError: if processes hold different states.
        SaveError: if a checkpoint could not be written.
    """
    config, started = run.config, time.perf_counter()
    recorder = Recorder(run, console)
    step_fn = dl.compile_step(run.method.step) if config.compile else run.method.step
    state, pool = run.saved
    stop = torch.zeros(())
    with recorder.bar, Preemption() as preemption, _saver(run) as saver:
        for step in range(run.first_step, config.steps):
            switched = run.method.schedule.switches(step, state.params())
            # Without a plan where nothing is switched, so that such a step costs nothing.
            plan = run.method.schedule(step, state.params()) if switched else None
            incoming = dl.switching.draw(pool, plan) if pool and plan else None
            lr, asked = torch.tensor(config.lr_at(step)), torch.tensor(float(preemption.is_asked))
            # Whether any process was asked to end comes with the gradients, so that all end after the same step. A look
            # at the step before leaves a device one to work on.
            is_last, before = step + 1 == config.steps, stop
            state, metrics = step_fn(state, batch(run, step), lr, plan, incoming, asked.to(config.torch_device()))
            stop = metrics.stop
            if pool and plan:
                pool = dl.switching.put_back(pool, plan, metrics.outgoing, donate=True)
            recorder.record(step, metrics, switched)
            is_stopped = not is_last and before.item() > 0
            done = step + 1
            if is_last or done % config.eval_every == 0:
                recorder.flush(validate=lambda: validate(run, state))  # noqa: B023, called at once
            is_saved = is_last or is_stopped or done % config.save_every == 0
            if is_saved:
                recorder.flush()  # sees that all is finite
            if run.ranks.group is not None and (is_saved or done % config.check_every == 0):
                dl.parallel.check_replicas((state, pool), run.ranks.group)
            if is_saved:
                saver.start(done, Saved(state, pool))
            if is_stopped:
                return None
    return finish(run, state, recorder, time.perf_counter() - started)


def _saver(run: Prepared) -> Saver:
    return Saver(run.folder / "checkpoints", run.ranks, keep=run.config.keep)


def batch(run: Prepared, step: int) -> Tensor:
    """The rows of this process, of a batch that is the same however many there are."""
    config = run.config
    tokens = text.batch(
        run.corpus.train,
        (config.grad_accum, config.batch_size),
        window=config.seq_len + 1,
        seed=config.seed,
        step=step,
    )
    return tokens[:, run.ranks.rows(config.batch_size)].to(config.torch_device())


def validate(run: Prepared, state: State) -> dict[str, float]:
    """The validation loss, and the largest drift of a base among those whose residual tells it."""
    drifts = [drift.item() for drift in dl.bases.drift(state.params()).values()]
    known = [drift for drift in drifts if not math.isnan(drift)]
    return {"validation_loss": validation_loss(run, state)} | ({"drift": max(known)} if known else {})


@torch.no_grad()
def validation_loss(run: Prepared, state: State) -> float:
    config, dtype = run.config, run.config.compute_torch_dtype()
    batches = text.validation_batches(
        run.corpus.validation, config.eval_batches, config.batch_size, window=config.seq_len + 1
    )[:, run.ranks.rows(config.batch_size)].to(config.torch_device())
    with torch.autocast(batches.device.type, dtype, enabled=dtype != torch.float32):
        losses = [next_token_loss(run.model, state.params(), tokens) for tokens in batches]
    loss = torch.stack(losses).mean()
    if run.ranks.group is not None:
        loss = dl.parallel.all_reduce_mean(loss, run.ranks.group, weight=run.ranks.share(config.batch_size))
    return loss.item()


def finish(run: Prepared, state: State, recorder: Recorder, seconds: float) -> dict[str, Any]:
    """Writes the model and the plot, by the first process, and returns the summary."""
    params = dl.parallel.unshard(state.params())
    if not run.ranks.is_first:
        return {}
    run.export(params)
    metrics = read_metrics(run.folder / "metrics.jsonl")
    unigram_loss = text.unigram_loss(run.corpus)
    plot(metrics, unigram_loss, run.folder / "loss.png")
    last_loss = metrics[-1]["validation_loss"]
    return {
        "method": run.config.method,
        "model": run.config.model,
        "steps": run.config.steps,
        "folder": str(run.folder),
        "processes": run.ranks.size,
        **sizes(run.method, wire_bytes(run)),
        "switched": sum(line["switched"] for line in metrics),
        "tokens_per_second": recorder.tokens_per_second(),
        "seconds": seconds,
        "drift": metrics[-1].get("drift"),
        "validation_loss": last_loss,
        "perplexity": math.exp(last_loss),
        "unigram_loss": unigram_loss,
    }
