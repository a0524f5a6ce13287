"""The training loop: take the steps that remain, log, save, evaluate and report; stop at any step."""

import time
from contextlib import closing, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from looped.graph import eagerly
from looped.sharding import own_part, whole
from looped.vocabulary import whole_vocabulary
from train import checkpoint, processes, report
from train.bad_steps import NOWHERE, BadSteps, locate
from train.checkpoint import Progress
from train.config import supervision_of
from train.depth import evaluated_depths
from train.interrupt import Interruptions
from train.metrics import MetricsLog, foreign_lines, read_metrics, write_json
from train.prepare import Run, set_learning_rate
from train.progress import (
    Clock,
    data_line,
    model_line,
    print_end,
    print_start,
    progress_bar,
    resume_command,
    show,
)
from train.saves import Saves
from train.state_norm import StateNorms
from train.step import LoopResult, StepResult, evaluate, learning_rate, to_device, training_step
from train.tasks.accuracy import with_accuracy

if TYPE_CHECKING:
    from train.checkpoint_writer import Saving

FIRST_SAVE = 50  # the step of the first checkpoint, unless they are more frequent


class NotFiniteError(RuntimeError):
    """The loss, a gradient or a weight is nan or infinite, and training has no use."""


def train(run: Run, interruptions: Interruptions) -> int:
    """Train to ``run.steps``, evaluate and report. Returns the exit code: 0, or 128 + n after signal n.

    Raises NotFiniteError after too many bad steps in a row, or if a weight is no number any more, and leaves
    diverged.json then; and OSError if a file cannot be written. The last checkpoint stays.
    """
    started = time.perf_counter()
    first = run.step
    print_start(run)
    with interruptions.deferred(), Saves(run.config.on_save_error) as saves:
        try:
            _optimise(run, interruptions, saves)
        except NotFiniteError as error:
            _note_divergence(run, error)
            raise
    if interruptions.pending is not None and run.step < run.steps:
        processes.forget_launch(run.out)
        print(f"\nstopped at step {run.step} of {run.steps}. To continue:\n  {resume_command(run.out)}")
        return 128 + interruptions.pending
    train_seconds = time.perf_counter() - started
    results = _evaluate(run)
    took = f"{run.steps - first} steps in {train_seconds:.0f} s"
    processes.from_first(lambda: _report(run, results, took, train_seconds, time.perf_counter() - started))
    if saves.failed:
        print(f"not saved {saves.failed} times on the way; at the end everything was")
    return 0


def _note_divergence(run: Run, error: NotFiniteError) -> None:
    """Leave word that the run ended by itself, and was not killed. It ends with ``error`` if that cannot be written."""
    with suppress(OSError):
        record = {"step": run.step, "reason": str(error)}
        processes.from_first(lambda: write_json(run.out / "diverged.json", record), promptly=True)


def _report(run: Run, results: list[LoopResult], took: str, train_seconds: float, seconds: float) -> None:
    from train import picture  # not above: it imports matplotlib, which --help has no use for

    rows = read_metrics(run.out / "metrics.jsonl")
    summary = {
        "preset": run.config.preset,
        "parameters": run.model.parameter_count(),
        "steps": run.steps,
        "bad_steps": rows[-1].get("bad_steps", 0) if rows else 0,
        "tokens": run.steps * run.tokens_per_step,
        "evaluation": [result._asdict() for result in results if result.n_loops <= run.config.n_loops],
        "evaluation_beyond": [result._asdict() for result in results if result.n_loops > run.config.n_loops],
        **report.environment(run.device),
        "processes": processes.world_size(),
        "cuda_graphs": run.graphs_used,
        "seconds": seconds,
        "train_seconds": train_seconds,
    }
    picture.draw(run.out / "report.png", rows, results, f"{model_line(run)}\n{data_line(run)}")
    processes.forget_launch(run.out)
    write_json(run.out / "summary.json", summary)  # last: it says that the run is complete
    print_end(run, rows, results, took)


def _is_logged(step: int, run: Run) -> bool:
    return step == 1 or step % run.config.log_every == 0 or step == run.steps


def _is_saved(step: int, run: Run) -> bool:
    every = run.config.save_every
    return every > 0 and (step % every == 0 or step == min(FIRST_SAVE, every)) and step < run.steps


def _optimise(run: Run, interruptions: Interruptions, saves: Saves) -> None:
    """Take the steps that remain, until a signal is pending, and save what was reached."""
    log = processes.from_first(lambda: _open_log(run))  # the others have a copy, and never write it
    bad_steps = BadSteps(
        run.config.max_bad_steps, run.device, total=log.kept[-1].get("bad_steps", 0) if log.kept else 0
    )
    bar, clock, state_norms = progress_bar(run), Clock(run), StateNorms(run.config.penalty)
    with closing(bar):
        while run.step < run.steps and not _stopping(interruptions):
            measure = _is_logged(run.step + 1, run)
            rate, result = _step(run, measure)
            bad_steps.add(result.bad)
            stop = processes.any_of(bad_steps.too_many())
            if measure or stop:
                row = _row(run, result, rate, clock, bad_steps.total)
                with saves.attempt():
                    processes.from_first(partial(log.append, row), promptly=True)
                show(bar, row, clock.left(run))
                if (warning := state_norms.warning(run.step, row["state_norm"])) is not None:
                    bar.write(warning)
            if stop:
                raise processes.agreed(NotFiniteError(_bad_steps_line(run, bad_steps.in_a_row())))
            bar.update(1)
            if _is_saved(run.step, run):
                with clock.paused():
                    with saves.attempt():
                        # Rows of before a checkpoint are not written again after it.
                        processes.from_first(log.flush, promptly=True)
                    saves.take(partial(save, run))
        saves.take_last(partial(save, run))
        processes.from_first(log.flush)


def _stopping(interruptions: Interruptions) -> bool:
    """Whether a signal is pending, in any of the processes: then it is in all of them."""
    signum = processes.largest(interruptions.pending or 0)
    if signum:
        interruptions.pending = signum
    return signum > 0


def _open_log(run: Run) -> MetricsLog:
    path = run.out / "metrics.jsonl"
    foreign = foreign_lines(path)
    if foreign:
        print(f"dropped   {len(foreign)} lines of {path} that are no rows of training, the first line {foreign[0]}")
    # A row of a step beyond the checkpoint will be written again. That of its own step may have been logged only as the
    # last one of a shorter run, and would not have been in this one. Those before stay, whatever --log-every is now.
    last = run.step if _is_logged(run.step, run) else run.step - 1
    return MetricsLog(path, keep=lambda row: row["step"] <= last)


def _bad_steps_line(run: Run, n: int) -> str:
    """Why the run stops. The first step of the row is repeated: the weights are still those that it began with."""
    first = run.step - n + 1
    places = processes.gather(_place(run, first))
    began = next((place for place in places if place != NOWHERE), NOWHERE)
    return (
        f"the loss or the gradient was not finite in {n} steps in a row, {first} to {run.step}, which were not taken. "
        f"At step {first} it began {began}. Lower --learning-rate."
    )


def _place(run: Run, first: int) -> str:
    inputs, targets = _batch(run, first - 1)
    n_loops = run.depth.at(run.config.seed, first - 1)
    with whole(run.model):
        return locate(run.model, inputs, targets, penalty=run.config.penalty, **_options(run, n_loops))


def _options(run: Run, n_loops: int) -> dict[str, Any]:
    """How a step of so many loops is computed, but for the penalty."""
    return {
        "supervision": supervision_of(run.config),
        "dtype": run.dtype,
        "n_loops": n_loops,
        "backprop_loops": run.config.backprop_loops,
        "grad_accumulation": run.config.grad_accumulation,
    }


def save(run: Run) -> "Saving":
    """Write the checkpoint of the present step. Raises NotFiniteError, leaving the one before, if a weight is not."""
    finite = torch.stack([own_part(weight.detach()).isfinite().all() for weight in run.model.parameters()]).all()
    if processes.any_of(not finite):
        line = f"a weight is not finite after step {run.step}. Lower --learning-rate."
        raise processes.agreed(NotFiniteError(line))
    progress = Progress(run.step, run.source.fingerprint)
    with whole_vocabulary(run.model, run.optimizer):
        return checkpoint.save(run.out, run.model, run.optimizer, progress, in_background=run.config.async_save)


def _batch(run: Run, step: int) -> tuple[Tensor, Tensor]:
    """This process's inputs and targets [B, T] of step ``step``, from 0, on the device."""
    config = run.config
    share = {"rank": processes.rank(), "world": processes.world_size()}
    inputs, targets = run.source.batch(step, seed=config.seed, batch_size=config.batch_size, **share)
    return to_device(inputs, run.device), to_device(targets, run.device)


def _step(run: Run, measure: bool) -> tuple[float, StepResult]:
    config = run.config
    inputs, targets = _batch(run, run.step)
    rate = learning_rate(
        run.step + 1,
        peak=config.learning_rate,
        schedule=config.schedule,
        warmup_steps=config.warmup_steps,
        steps=run.schedule_steps,
    )
    set_learning_rate(run.optimizer, rate)
    processes.seed_step(config.seed, run.step)
    run.trained.train()
    launch = run.launch if run.capture_refusal is None else eagerly
    n_loops = run.depth.at(config.seed, run.step)
    result = launch(_training_step, run, measure, n_loops, inputs, targets, run.penalty)
    run.step += 1
    return rate, result


def _training_step(
    run: Run, measure: bool, n_loops: int, inputs: Tensor, targets: Tensor, penalty: float | Tensor
) -> StepResult:
    """What is captured on a GPU: once for each depth, measured or not."""
    how = {"grad_clip": run.config.grad_clip, "measure": measure} | _options(run, n_loops)
    return training_step(run.trained, run.optimizer, inputs, targets, penalty=penalty, **how)


def _row(run: Run, result: StepResult, rate: float, clock: Clock, bad_steps: Tensor) -> dict[str, Any]:
    """A line of metrics.jsonl. Here, and only here, training waits for the device: once."""
    tokens_per_second, mfu = clock.rates(run)
    n_loops = len(result.per_loop)
    unknown = torch.full_like(result.per_loop, torch.nan)  # of a step that was not measured
    per_loop = [
        result.per_loop,
        unknown if result.state_norm is None else result.state_norm,
        unknown if result.radial_fraction is None else result.radial_fraction,
    ]
    scalars = torch.stack([result.loss.float(), result.grad_norm.float(), bad_steps.float()])
    exits = scalars[:0] if result.exits is None else result.exits
    loss, grad_norm, n_bad, *values = torch.cat([scalars, *per_loop, exits]).tolist()
    row = {
        "step": run.step,
        "tokens": run.step * run.tokens_per_step,
        "n_loops": n_loops,
        "loss": loss,
        "ce": values[:n_loops],
        "state_norm": values[n_loops : 2 * n_loops],
        "radial_fraction": values[2 * n_loops : 3 * n_loops],
        "grad_norm": grad_norm,
        "lr": rate,
        "bad_steps": int(n_bad),
        "tokens_per_second": tokens_per_second,
        "mfu": mfu,
    }
    return row | dict(zip(("exit_loop", "exit_entropy"), values[3 * n_loops :], strict=False))


def _evaluate(run: Run) -> list[LoopResult]:
    config, source = run.config, run.source
    sequences, indices = source.validation(config.eval_tokens)
    deepest = config.eval_loops or config.n_loops
    depths = evaluated_depths(config.n_loops, deepest) if source.task is None else tuple(range(1, deepest + 1))
    at_once = config.batch_size // config.grad_accumulation  # what training has memory for
    how: dict[str, Any] = {"batch_size": at_once, "device": run.device, "dtype": run.dtype}
    with whole_vocabulary(run.model):  # a process may have fewer rows to evaluate than another
        results = evaluate(
            run.model,
            sequences,
            indices,
            bytes_per_token=source.bytes_per_token,
            depths=depths,
            launch=run.launch,
            **how,
        )
        if source.task is None:
            return results
        return with_accuracy(results, source.task, run.model, sequences, indices, **how)
