"""A run: set up everything that can fail, train, evaluate, report; stop and continue at any step."""

import dataclasses
import fcntl
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from tqdm import tqdm

from looped.decoder import LoopedDecoder
from looped.flash_attention import attention_implementation
from train import checkpoint, report
from train.batches import Windows, batch_indices, evaluation_windows
from train.checkpoint import Progress
from train.config import TrainConfig, check_out_directory, device_of, model_config
from train.data import TokenData, cache_directory, load_data
from train.interrupt import Interruptions
from train.metrics import MetricsLog, read_metrics, write_json
from train.step import LoopResult, StepResult, evaluate, learning_rate, to_device, training_step


@dataclass
class Run:
    """A run that is ready to train: everything is checked, loaded and built, and its directory is there.

    step: optimisation steps done. steps: those to do, all told.
    """

    config: TrainConfig
    out: Path
    data: TokenData
    model: LoopedDecoder
    optimizer: torch.optim.Optimizer
    device: torch.device
    dtype: torch.dtype
    windows: Windows
    steps: int
    attention: str  # what serves it in training
    step: int = 0
    lock: int | None = None  # a descriptor of the directory, which no other process may train in

    def close(self) -> None:
        """Let go of the directory."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None


class NotFiniteError(RuntimeError):
    """The loss or a weight is nan or infinite."""


def prepare(config: TrainConfig) -> Run:
    """Load the text, build the model, restore a checkpoint; then, and only then, write the run's directory.

    ``config``: resolved and validated. Raises ValueError or OSError, leaving nothing behind.
    """
    # Saturated softmaxes make denormals, which x86 computes with several times slower.
    torch.set_flush_denormal(True)
    device = device_of(config)
    data = load_data(
        config.data,
        tokenizer=config.tokenizer,
        vocab_size=config.vocab_size,
        seq_len=config.seq_len,
        cache=cache_directory(config.cache),
    )
    torch.manual_seed(config.seed)
    shape = model_config(config, config.vocab_size or data.tokenizer.vocab_size)
    model = LoopedDecoder(shape, fused=config.fused, checkpoint_loops=config.checkpoint_loops).to(device)
    if config.compile:
        model.compile()  # in place, so that parameters keep their names
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    windows = Windows(data.train.tokens, config.seq_len, config.stride or config.seq_len)
    steps = config.steps or math.ceil((config.epochs or 0) * len(windows) / config.batch_size)
    assert config.out is not None  # complete
    dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    attention = attention_implementation(device, dtype, shape.head_dim, shape.dropout, compiled=config.compile)
    run = Run(config, config.out, data, model, optimizer, device, dtype, windows, steps, attention)
    try:
        if config.resume is None:
            _write_directory(run)
        else:
            _restore(run)
    except BaseException:
        run.close()
        raise
    return run


def _hold(out: Path) -> int:
    """Lock a directory until the returned descriptor is closed, at the latest when this process ends.

    Raises ValueError if another process has it. On a file system without locks everybody has it.
    """
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(f"out directory {out} must not be in use. Another process trains there.") from None
    except OSError:
        pass
    return handle


def _write_directory(run: Run) -> None:
    created = not run.out.exists()
    try:
        run.out.mkdir(parents=True, exist_ok=True)
        run.lock = _hold(run.out)
        check_out_directory(run.out)  # another process may have been first while the text was loaded
        run.data.tokenizer.model.save(str(run.out / "tokenizer.json"))
        _write_validation(run)
        _write_config(run)
    except OSError as error:
        if created:
            shutil.rmtree(run.out, ignore_errors=True)
        raise ValueError(f"out directory {run.out} is not writable ({error}).") from error


def _write_validation(run: Run) -> None:
    """validation.safetensors: the whole validation split, so that whoever has the directory can measure on its text.

    tokens [n]; bounds [documents + 1], where documents begin and end; and, if bits per byte are defined,
    bytes_per_token [V]; each in the smallest unsigned integers that hold it.
    """
    arrays = {"tokens": run.data.validation.tokens, "bounds": run.data.validation.bounds}
    if run.data.lossless:
        arrays["bytes_per_token"] = run.data.tokenizer.bytes_per_token
    small = {name: array.astype(np.min_scalar_type(array.max())) for name, array in arrays.items()}
    scratch = run.out / "validation.safetensors.new"
    scratch.write_bytes(safetensors.numpy.save(small))
    os.replace(scratch, run.out / "validation.safetensors")


def _write_config(run: Run) -> None:
    """config.json: the resolved configuration, with what belongs to this directory and this process left out."""
    config = dataclasses.asdict(run.config) | {"out": None, "resume": None}
    for name, names in (("data", ("sotu", "wikitext-103")), ("tokenizer", ("bpe", "paper"))):
        if config[name] not in names:
            config[name] = os.path.abspath(config[name])  # a run may be continued from another directory
    config["cache"] = None if run.config.cache is None else str(run.config.cache.absolute())
    write_json(run.out / "config.json", {"train": config, "model": dataclasses.asdict(run.model.config)})


def _restore(run: Run) -> None:
    run.lock = _hold(run.out)
    progress = checkpoint.load(run.out, run.model, run.optimizer)
    if progress.fingerprint != run.data.fingerprint:
        raise ValueError(f"the text or the tokenizer is not the one that {run.out} was begun with.")
    if run.steps < progress.step:
        raise ValueError(
            f"steps must be at least those that {run.out} has done. Got steps={run.steps}, done {progress.step}."
        )
    if run.steps == progress.step and (run.out / "summary.json").exists():
        raise ValueError(f"{run.out} is complete at step {run.steps}. Continue it with --steps above that.")
    run.step = progress.step
    for name in ("summary.json", "report.png"):
        (run.out / name).unlink(missing_ok=True)  # of the steps done so far
    _write_config(run)


def train(run: Run, interruptions: Interruptions) -> int:
    """Train to ``run.steps``, evaluate and report. Returns the exit code: 0, or 128 + n after signal n.

    Raises NotFiniteError if the loss or a weight is no number any more; the last checkpoint stays.
    """
    started = time.perf_counter()
    first = run.step
    print(
        f"training  {_model_line(run)}\non        {_data_line(run)}\nattention {run.attention}\n"
        f"into      {run.out}, from step {first}",
        flush=True,
    )
    with interruptions.deferred():
        _optimise(run, interruptions)
        save(run)
    if interruptions.pending is not None and run.step < run.steps:
        print(f"\nstopped at step {run.step} of {run.steps}. To continue:\n  {resume_command(run.out)}")
        return 128 + interruptions.pending
    train_seconds = time.perf_counter() - started
    results = _evaluate(run)
    rows = read_metrics(run.out / "metrics.jsonl")
    summary = {
        "preset": run.config.preset,
        "parameters": run.model.parameter_count(),
        "steps": run.steps,
        "tokens": run.steps * _tokens_per_step(run),
        "evaluation": [result._asdict() for result in results],
        **report.environment(run.device),
        "seconds": time.perf_counter() - started,
        "train_seconds": train_seconds,
    }
    report.draw(run.out / "report.png", rows, results, f"{_model_line(run)}\n{_data_line(run)}")
    write_json(run.out / "summary.json", summary)  # last: it says that the run is complete
    _print_end(run, rows, results, f"{run.steps - first} steps in {train_seconds:.0f} s")
    return 0


def _tokens_per_step(run: Run) -> int:
    return run.config.batch_size * run.windows.seq_len


def _is_logged(step: int, run: Run) -> bool:
    return step == 1 or step % run.config.log_every == 0 or step == run.steps


def _optimise(run: Run, interruptions: Interruptions) -> None:
    """Take the steps that remain, until a signal is pending."""
    # A row of a step beyond the checkpoint will be written again; one that was logged only as the last step of a
    # shorter run would not have been in this one.
    log = MetricsLog(
        run.out / "metrics.jsonl", keep=lambda row: row["step"] <= run.step and _is_logged(row["step"], run)
    )
    bar = tqdm(
        total=run.steps,
        initial=run.step,
        desc="training",
        disable=None,
        bar_format="{desc} {n_fmt}/{total_fmt} {percentage:3.0f}%|{bar:12}| {remaining} left{postfix}",
    )
    clock = _Clock(run)
    with closing(log), closing(bar):
        while run.step < run.steps and interruptions.pending is None:
            measure = _is_logged(run.step + 1, run)
            rate, result = _step(run, measure)
            if measure:
                row = _row(run, result, rate, clock.tokens_per_second(run))
                log.append(row)
                _show(bar, row, clock.left(run))
                if not math.isfinite(row["loss"]):
                    raise NotFiniteError(f"the loss is {row['loss']} at step {run.step}. Lower --learning-rate.")
            bar.update(1)
            if run.config.save_every and run.step % run.config.save_every == 0 and run.step < run.steps:
                with clock.paused():
                    save(run)


def save(run: Run) -> None:
    """Write the checkpoint of the present step. Raises NotFiniteError, leaving the one before, if a weight is not."""
    if not bool(torch.stack([weight.detach().isfinite().all() for weight in run.model.parameters()]).all()):
        raise NotFiniteError(f"a weight is not finite after step {run.step}. Lower --learning-rate.")
    checkpoint.save(run.out, run.model, run.optimizer, Progress(run.step, run.data.fingerprint))


def _step(run: Run, measure: bool) -> tuple[float, StepResult]:
    config = run.config
    indices = batch_indices(len(run.windows), seed=config.seed, step=run.step, batch_size=config.batch_size)
    inputs, targets = (to_device(tensor, run.device) for tensor in run.windows.gather(indices))
    rate = learning_rate(
        run.step + 1,
        peak=config.learning_rate,
        schedule=config.schedule,
        warmup_steps=config.warmup_steps,
        steps=run.steps,
    )
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.model.train()
    result = training_step(
        run.model,
        run.optimizer,
        inputs,
        targets,
        supervision=config.supervision,
        penalty=config.penalty,
        dtype=run.dtype,
        grad_accumulation=config.grad_accumulation,
        grad_clip=config.grad_clip,
        measure=measure,
    )
    run.step += 1
    return rate, result


def _row(run: Run, result: StepResult, rate: float, tokens_per_second: float) -> dict[str, Any]:
    """A line of metrics.jsonl. Here, and only here, training waits for the device: once."""
    assert result.state_norm is not None
    assert result.radial_fraction is not None
    n_loops = len(result.per_loop)
    values = torch.cat(
        [
            torch.stack([result.loss, result.grad_norm]).float(),
            result.per_loop,
            result.state_norm,
            result.radial_fraction,
        ]
    ).tolist()
    return {
        "step": run.step,
        "tokens": run.step * _tokens_per_step(run),
        "loss": values[0],
        "ce": values[2 : 2 + n_loops],
        "state_norm": values[2 + n_loops : 2 + 2 * n_loops],
        "radial_fraction": values[2 + 2 * n_loops :],
        "grad_norm": values[1],
        "lr": rate,
        "tokens_per_second": tokens_per_second,
    }


class _Clock:
    """Tokens per second since the last call, and the time left at the mean rate; pauses count in neither."""

    def __init__(self, run: Run) -> None:
        self._first_step = self._last_step = run.step
        self._first = self._last = time.perf_counter()

    def tokens_per_second(self, run: Run) -> float:
        now = time.perf_counter()
        rate = (run.step - self._last_step) * _tokens_per_step(run) / (now - self._last)
        self._last, self._last_step = now, run.step
        return rate

    def left(self, run: Run) -> str:
        per_step = (time.perf_counter() - self._first) / (run.step - self._first_step)
        seconds = round(per_step * (run.steps - run.step))
        return f"{seconds // 60}:{seconds % 60:02d}"

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        pause = time.perf_counter() - start
        self._first += pause
        self._last += pause


def _show(bar: tqdm, row: dict[str, Any], left: str) -> None:
    """The latest row: beside the progress bar on a terminal, as a line of its own elsewhere."""
    ce = "/".join(f"{value:.2f}" for value in row["ce"])
    state = f"loss {row['loss']:.3f}  CE {ce}  |H_{len(row['ce'])}| {row['state_norm'][-1]:.4g}"
    rate = f"{row['tokens_per_second']:,.0f} tokens/s"
    if bar.disable:
        print(f"step {row['step']}/{bar.total}  {state}  {rate}  {left} left", flush=True)
    else:
        bar.set_postfix_str(f"{state}  {rate}", refresh=False)


def _evaluate(run: Run) -> list[LoopResult]:
    config = run.config
    windows, indices = evaluation_windows(run.data.validation.tokens, config.seq_len, config.eval_tokens)
    return evaluate(
        run.model,
        windows,
        indices,
        batch_size=config.batch_size,
        device=run.device,
        dtype=run.dtype,
        bytes_per_token=run.data.tokenizer.bytes_per_token if run.data.lossless else None,
    )


def _model_line(run: Run) -> str:
    config = run.config
    return (
        f"{config.preset}: {run.model.parameter_count():,} parameters, K = {config.n_loops} loops, {config.readout} "
        f"readout, {config.supervision} supervision, penalty {config.penalty:g}, "
        f"{'fused' if config.fused else 'plain PyTorch'}, {config.dtype} on {run.device.type}"
    )


def _data_line(run: Run) -> str:
    config, tokenizer = run.config, run.data.tokenizer
    return (
        f"{Path(config.data).name}, {Path(config.tokenizer).name} tokenizer ({tokenizer.vocab_size:,} tokens): "
        f"{run.steps} steps x {config.batch_size} x {config.seq_len} = {run.steps * _tokens_per_step(run):,} tokens "
        f"of {len(run.data.train.tokens):,}"
    )


def _print_end(run: Run, rows: Sequence[dict[str, Any]], results: Sequence[LoopResult], took: str) -> None:
    def losses(row: dict[str, Any]) -> str:
        return " ".join("-" if value is None else f"{value:.3f}" for value in row["ce"])

    print(f"\ntrained   {_model_line(run)}")
    print(f"on        {_data_line(run)}; {took}")
    if rows:
        print(f"learning  CE of loops 1..{run.config.n_loops}: {losses(rows[0])} at step {rows[0]['step']}, ", end="")
        print(f"{losses(rows[-1])} at step {rows[-1]['step']}")
    print("validation, stopping after K loops:")
    print(report.table(results))
    print(f"files     {run.out}: {', '.join(sorted(path.name for path in run.out.iterdir()))}")


def resume_command(out: Path) -> str:
    """The shell command that continues the run in ``out`` from the present directory."""
    program = (sys.executable, str(Path(__file__).with_name("run.py")))
    return shlex.join([*(_shorter(path) for path in program), "--resume", str(out)])


def _shorter(path: str) -> str:
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative
