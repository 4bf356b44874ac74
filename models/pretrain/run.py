"""Run the training loop, and write the results at the end."""

import math
import signal
import sys
import time
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import dynlora_fn as dl
from models import corpus as text
from models.pretrain.banner import show
from models.pretrain.checkpoint import SaveError, Saver
from models.pretrain.config import Config
from models.pretrain.device import compute_dtype, run_device
from models.pretrain.learning_rate import lr_at
from models.pretrain.method import State, next_token_loss
from models.pretrain.plot import compared_runs, plot, title
from models.pretrain.prepared import Prepared, Saved
from models.pretrain.processes import SINGLE_PROCESS, Processes
from models.pretrain.progress import duration, read_metrics, read_start, write_start
from models.pretrain.recorder import Recorder, wire_bytes
from models.pretrain.report import sizes
from models.pretrain.sample import sample
from models.pretrain.stopping import Preemption, Stopped, name_of, naming

_LARGEST_EXPONENT = math.log(sys.float_info.max)


def train(run: Prepared, console: Console) -> dict[str, Any] | Stopped:
    """Train to the last step and return the summary.

    After SIGTERM, SIGHUP or a first Ctrl-C, save a checkpoint and return `Stopped`.

    Raises:
        DivergedError: If the loss or the gradient is not finite any more. The checkpoints before remain.
        DriftedError: If processes have different states.
        SaveError: If a checkpoint or the model could not be written.
        OSError: If another file could not be written. The error names the file.
    """
    config, started = run.config, time.perf_counter()
    steps, output, device = config.training.steps, config.output, run_device(config)
    if run.first_step < steps:
        show(run, console)
    if run.first_step == 0:
        _validate_first(run, console)
    recorder = Recorder(run, console)
    step_fn = dl.compile_step(run.method.step) if config.machine.compile else run.method.step
    state, pool = run.saved
    stop = torch.zeros(())
    with recorder.bar, Preemption(partial(_announce, console)) as preemption, _saver(run) as saver:
        for step in range(run.first_step, steps):
            switched = run.method.schedule.switches(step, state.params())
            # Without a plan, a step does no work for switches.
            plan = run.method.schedule(step, state.params()) if switched else None
            incoming = dl.switching.draw(pool, plan) if pool and plan else None
            # The request to stop is all-reduced with the gradients, so that all processes stop after the same step. The
            # loop reads it from the previous step, so that the device has a step to compute meanwhile.
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
            if output.sample_every and (is_last or done % output.sample_every == 0):
                with recorder.paused():
                    console.print(f"step {done}: {sample(run, state)}", markup=False, highlight=False, soft_wrap=True)
            is_saved = is_last or is_stopped or done % output.save_every == 0
            if is_saved:
                recorder.flush()  # raises if a result is not finite
            if run.processes.group is not None and (is_saved or done % config.machine.check_every == 0):
                dl.parallel.check_replicas((state, pool), run.processes.group)
            if is_saved:
                saver.start(done, Saved(state, pool))
            if is_stopped:
                return Stopped(done, run.processes.first_not_none(preemption.signal))
    return finish(run, state, recorder, time.perf_counter() - started)


def _validate_first(run: Prepared, console: Console) -> None:
    """Compute the validation loss before the first step, and show it.

    The time of the run is estimated from the time of this computation.
    """
    started, output, steps = time.perf_counter(), run.config.output, run.config.training.steps
    loss = validation_loss(run.config, run.model, run.saved.state.params(), run.corpus, run.processes)
    forward = (time.perf_counter() - started) / output.eval_batches
    # A backward pass is estimated to take twice as long as a forward pass.
    estimate = forward * (3 * steps * run.config.data.grad_accum + output.eval_batches * steps // output.eval_every)
    if run.processes.is_first:
        write_start(run.folder / "start.json", loss)
    bits = run.corpus.bits_per_byte(loss)
    text = (
        f"validation loss before the first step {loss:.3f} ({bits:.3f} bits/byte); about {duration(estimate)} to train"
    )
    console.print(text, highlight=False, soft_wrap=True)


def _announce(console: Console, number: int) -> None:
    """Print that a signal has arrived.

    SIGHUP means that the terminal is closed, so nothing is printed after it.
    """
    if name_of(number) == "SIGHUP":
        console.quiet = True
    again = "; press it again to stop at once" if number == signal.SIGINT else ""
    text = f"{name_of(number)}: saving a checkpoint after the next step{again}"
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def _saver(run: Prepared) -> Saver:
    return Saver(run.folder / "checkpoints", run.processes, keep=run.config.output.keep, settings=run.settings)


def batch(run: Prepared, step: int) -> Tensor:
    """Return the rows of this process in the batch of a step.

    The batch of all processes does not depend on their number.
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

    The drift is included if a base has a residual, which is needed to compute it.
    """
    drifts = [drift.item() for drift in dl.bases.drift(state.params()).values()]
    known = [drift for drift in drifts if not math.isnan(drift)]
    loss = validation_loss(run.config, run.model, state.params(), run.corpus, run.processes)
    return {"validation_loss": loss} | ({"drift": max(known)} if known else {})


@torch.no_grad()
def validation_loss(
    config: Config, model: nn.Module, params: dict[str, Any], corpus: text.Corpus, processes: Processes = SINGLE_PROCESS
) -> float:
    """Return the mean loss of the validation batches.

    Collective: call it on every process.
    """
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
    """Write the model and the plot, and return the summary.

    Collective: call it on every process. Only the first process writes. The other processes return an empty summary.
    """
    params = dl.parallel.unshard(state.params())
    if not run.processes.is_first:
        return {}
    try:
        with naming(run.folder):
            run.export(params)
    except ValueError as error:
        raise SaveError(f"the model could not be written: {error}") from error
    metrics = read_metrics(run.folder / "metrics.jsonl")
    unigram_loss = text.unigram_loss(run.corpus)
    bits_per_nat = run.corpus.bits_per_byte(1.0)
    plot(
        metrics,
        run.folder / "loss.png",
        before=read_start(run.folder / "start.json"),
        title=title(run.config),
        unigram_loss=unigram_loss,
        bits_per_nat=bits_per_nat,
        compared=compared_runs(run.config.output.compare),
    )
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
        "tokens_per_second": recorder.tokens_per_second(),  # None means that no step was taken
        "seconds": seconds,
        "drift": metrics[-1].get("drift"),
        "validation_loss": last_loss,
        "bits_per_byte": run.corpus.bits_per_byte(last_loss),
        "perplexity": perplexity(last_loss),
        "unigram_loss": unigram_loss,
    }


def perplexity(loss: float) -> float:
    """Return e to the power of the loss, or infinity if this exceeds a float."""
    return math.inf if loss >= _LARGEST_EXPONENT else math.exp(loss)
