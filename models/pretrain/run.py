"""The training loop, and the results that it writes at the end."""

import math
import time
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import dynlora_fn as dl
from models import corpus as text
from models.pretrain.checkpoint import Saver
from models.pretrain.config import Config
from models.pretrain.device import compute_dtype, run_device
from models.pretrain.learning_rate import lr_at
from models.pretrain.method import State, next_token_loss
from models.pretrain.prepared import Prepared, Saved
from models.pretrain.processes import SINGLE_PROCESS, Preemption, Processes
from models.pretrain.progress import read_metrics
from models.pretrain.recorder import Recorder, wire_bytes
from models.pretrain.report import plot, sizes


def train(run: Prepared, console: Console) -> dict[str, Any] | None:
    """Train to the last step and return the summary.

    After SIGTERM, save and return None.

    Raises:
        DivergedError: If the loss or the gradient is no longer finite. The last good checkpoint remains.
        DriftedError: If processes have different states.
        SaveError: If a checkpoint could not be written.
    """
    config, started = run.config, time.perf_counter()
    steps, output, device = config.training.steps, config.output, run_device(config)
    recorder = Recorder(run, console)
    step_fn = dl.compile_step(run.method.step) if config.machine.compile else run.method.step
    state, pool = run.saved
    stop = torch.zeros(())
    with recorder.bar, Preemption() as preemption, _saver(run) as saver:
        for step in range(run.first_step, steps):
            switched = run.method.schedule.switches(step, state.params())
            # A step without switches gets no plan, so that it does no work for them.
            plan = run.method.schedule(step, state.params()) if switched else None
            incoming = dl.switching.draw(pool, plan) if pool and plan else None
            # The request to stop is reduced with the gradients, so that all processes end after the same step. The
            # loop reads the result of the step before, so that a device always has one step to work on.
            requested, previous_stop = torch.tensor(float(preemption.is_requested)), stop
            lr, is_last = torch.tensor(lr_at(config, step)), step + 1 == steps
            state, metrics = step_fn(state, batch(run, step), lr, plan, incoming, requested.to(device))
            stop = metrics.stop
            if pool and plan:
                pool = dl.switching.put_back(pool, plan, metrics.outgoing, donate=True)
            recorder.record(step, metrics, switched)
            is_stopped = not is_last and previous_stop.item() > 0
            done = step + 1
            if is_last or done % output.eval_every == 0:
                recorder.flush(validate=lambda: validate(run, state))  # noqa: B023, called at once
            is_saved = is_last or is_stopped or done % output.save_every == 0
            if is_saved:
                recorder.flush()  # raises if a result is not finite
            if run.processes.group is not None and (is_saved or done % config.machine.check_every == 0):
                dl.parallel.check_replicas((state, pool), run.processes.group)
            if is_saved:
                saver.start(done, Saved(state, pool))
            if is_stopped:
                return None
    return finish(run, state, recorder, time.perf_counter() - started)


def _saver(run: Prepared) -> Saver:
    return Saver(run.folder / "checkpoints", run.processes, keep=run.config.output.keep)


def batch(run: Prepared, step: int) -> Tensor:
    """Return this process's rows of the batch.

    The batch does not depend on the number of processes.
    """
    data = run.config.data
    tokens = text.batch(
        run.corpus.train,
        (data.grad_accum, data.batch_size),
        window=data.seq_len + 1,
        seed=run.config.training.seed,
        step=step,
    )
    return tokens[:, run.processes.rows(data.batch_size)].to(run_device(run.config))


def validate(run: Prepared, state: State) -> dict[str, float]:
    """Return the validation loss, and the largest drift of a base.

    Only bases with a residual have a known drift.
    """
    drifts = [drift.item() for drift in dl.bases.drift(state.params()).values()]
    known = [drift for drift in drifts if not math.isnan(drift)]
    loss = validation_loss(run.config, run.model, state.params(), run.corpus, run.processes)
    return {"validation_loss": loss} | ({"drift": max(known)} if known else {})


@torch.no_grad()
def validation_loss(
    config: Config, model: nn.Module, params: dict[str, Any], corpus: text.Corpus, processes: Processes = SINGLE_PROCESS
) -> float:
    """Return the mean loss of the validation batches. Collective."""
    data, dtype = config.data, compute_dtype(config)
    batches = text.validation_batches(
        corpus.validation, config.output.eval_batches, data.batch_size, window=data.seq_len + 1
    )[:, processes.rows(data.batch_size)].to(run_device(config))
    with torch.autocast(batches.device.type, dtype, enabled=dtype != torch.float32):
        losses = [next_token_loss(model, params, tokens) for tokens in batches]
    loss = torch.stack(losses).mean()
    if processes.group is not None:
        loss = dl.parallel.all_reduce_mean(loss, processes.group, weight=processes.weight(data.batch_size))
    return loss.item()


def finish(run: Prepared, state: State, recorder: Recorder, seconds: float) -> dict[str, Any]:
    """Write the model and the plot, and return the summary. Collective.

    Only the first process writes. The others return an empty summary.
    """
    params = dl.parallel.unshard(state.params())
    if not run.processes.is_first:
        return {}
    run.export(params)
    metrics = read_metrics(run.folder / "metrics.jsonl")
    unigram_loss = text.unigram_loss(run.corpus)
    plot(metrics, unigram_loss, run.folder / "loss.png")
    last_loss = metrics[-1]["validation_loss"]
    training = run.config.training
    return {
        "method": training.method,
        "model": training.model,
        "steps": training.steps,
        "folder": str(run.folder),
        "processes": run.processes.world_size,
        **sizes(run.method, wire_bytes(run)),
        "switched": sum(line["switched"] for line in metrics),
        "tokens_per_second": recorder.tokens_per_second(),
        "seconds": seconds,
        "drift": metrics[-1].get("drift"),
        "validation_loss": last_loss,
        "perplexity": math.exp(last_loss),
        "unigram_loss": unigram_loss,
    }
