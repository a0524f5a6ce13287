"""What a run says: the lines at its start and end, the latest row, and the speed."""

import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from looped.graph import eagerly
from looped.peak_flops import peak_flops
from train import checkpoint, processes, report
from train.prepare import Run
from train.step import LoopResult


class Clock:
    """Tokens per second since the last call, and the time left at the mean rate; pauses count in neither."""

    def __init__(self, run: Run) -> None:
        self._first_step = self._last_step = run.step
        self._first = self._last = time.perf_counter()

    def rates(self, run: Run) -> tuple[float, float | None]:
        """Tokens per second of the steps since the last call, and the `utilisation` in them."""
        now = time.perf_counter()
        steps, seconds = range(self._last_step, run.step), now - self._last
        self._last, self._last_step = now, run.step
        return len(steps) * run.tokens_per_step / seconds, utilisation(run, steps, seconds)

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


def utilisation(run: Run, steps: Sequence[int], seconds: float) -> float | None:
    """The share of the GPU's dense bf16 FLOP/s that the model's own FLOPs make up; None where that is not known.

    steps: those taken in the seconds, from 0. Each counts at its own depth.
    """
    peak = peak_flops(run.device)  # of one of the processes' devices
    if peak is None:
        return None
    config = run.config
    per_token = sum(
        run.model.flops_per_token(
            run.depth.at(config.seed, step),
            n_readouts=1 if config.supervision == "terminal" else None,
            seq_len=config.seq_len,
            backprop_loops=config.backprop_loops,
        )
        for step in steps
    )
    return per_token * run.tokens_per_step / seconds / (peak * processes.world_size())


def progress_bar(run: Run) -> tqdm:
    return tqdm(
        total=run.steps,
        initial=run.step,
        desc="training",
        disable=None,
        bar_format="{desc} {n_fmt}/{total_fmt} {percentage:3.0f}%|{bar:12}| {remaining} left{postfix}",
    )


def show(bar: tqdm, row: dict[str, Any], left: str) -> None:
    """The latest row: beside the progress bar on a terminal, as a line of its own elsewhere."""
    ce = "/".join("-" if math.isnan(value) else f"{value:.2f}" for value in row["ce"])
    state = f"loss {row['loss']:.3f}  CE {ce}  |H_{len(row['ce'])}| {row['state_norm'][-1]:.4g}"
    if "exit_loop" in row:
        state += f"  exit {row['exit_loop']:.2f}"
    rate = f"{row['tokens_per_second']:,.0f} tokens/s"
    if row["mfu"] is not None:
        rate += f"  MFU {row['mfu']:.1%}"
    if row["bad_steps"]:
        rate += f"  bad steps {row['bad_steps']}"
    if bar.disable:
        print(f"step {row['step']}/{bar.total}  {state}  {rate}  {left} left", flush=True)
    else:
        bar.set_postfix_str(f"{state}  {rate}", refresh=False)


def print_start(run: Run) -> None:
    print(f"training  {model_line(run)}\non        {data_line(run)}")
    if run.config.schedule == "warmup-cosine":
        after = "" if run.schedule_steps >= run.steps else f", then constant to step {run.steps}"
        print(f"schedule  {run.config.schedule} over {run.schedule_steps} steps{after}")
    for change in run.changes:
        print(f"changed   {change}, from step {run.step + 1} on")
    print(f"attention {run.attention}")
    if run.device.type == "cuda":
        print(f"launched  {launch_line(run)}")
    print(f"into      {run.out}, from step {run.step}", flush=True)


def launch_line(run: Run) -> str:
    if run.launch is eagerly:
        several = processes.world_size() > 1 and run.config.cuda_graph
        return "kernel by kernel" + (" (several processes capture no CUDA graphs)" if several else "")
    if run.capture_refusal is not None:
        return f"kernel by kernel ({run.capture_refusal}); evaluation as CUDA graphs"
    return "as CUDA graphs"


def model_line(run: Run) -> str:
    config = run.config
    gate = f" (beta {config.gate_beta:g}, {config.gate_prior} prior)" if config.supervision == "gated" else ""
    return (
        f"{config.preset}: {run.model.parameter_count():,} parameters, K = {config.n_loops} loops{_depth(run)}, "
        f"{config.readout} readout, {config.supervision} supervision{gate}, penalty {config.penalty:g}, "
        f"{'fused' if config.fused else 'plain PyTorch'}, {config.dtype} on {_devices(run)}"
    )


def _devices(run: Run) -> str:
    n, shards = processes.world_size(), " that share the weights" if run.config.shard == "fsdp2" else ""
    return run.device.type if n == 1 else f"{n} {run.device.type} processes{shards}"


def _depth(run: Run) -> str:
    """How training differs from K loops with gradients: in words, or nothing."""
    config = run.config
    drawn = "" if config.depth == "fixed" else f" (trained at {config.depth}: {', '.join(map(str, run.depth.values))})"
    return drawn + ("" if config.backprop_loops is None else f", gradients through the last {config.backprop_loops}")


def data_line(run: Run) -> str:
    config, source = run.config, run.source
    trained = f"{run.steps} steps x {config.batch_size} x {config.seq_len} = {run.steps * run.tokens_per_step:,} tokens"
    return f"{source.description}: {trained}" + ("" if source.n_tokens is None else f" of {source.n_tokens:,}")


def print_end(run: Run, rows: Sequence[dict[str, Any]], results: Sequence[LoopResult], took: str) -> None:
    def losses(row: dict[str, Any]) -> str:
        return " ".join("-" if value is None else f"{value:.3f}" for value in row["ce"])

    print(f"\ntrained   {model_line(run)}")
    print(f"on        {data_line(run)}; {took}")
    if rows:
        print(f"learning  CE of every loop: {losses(rows[0])} at step {rows[0]['step']}, ", end="")
        print(f"{losses(rows[-1])} at step {rows[-1]['step']}")
    if rows and rows[-1].get("exit_loop") is not None:
        print(f"exits     after {rows[-1]['exit_loop']:.2f} loops on average, with an entropy of ", end="")
        print(f"{rows[-1]['exit_entropy']:.3f} nats, at step {rows[-1]['step']}")
    if rows and rows[-1].get("bad_steps"):
        print(f"bad steps {rows[-1]['bad_steps']}, not taken: their loss or gradient was not finite")
    graphs = ", launched as CUDA graphs" if run.graphs_used else ""
    print(f"validation, stopping after K loops{graphs}:")
    print(report.table(results))
    print(f"files     {run.out}: {', '.join(sorted(path.name for path in run.out.iterdir()))}")


def resume_command(out: Path, *options: str) -> str:
    """The shell command that continues the run in ``out`` from the present directory."""
    several = os.environ.get("LOCAL_WORLD_SIZE", "1") if processes.world_size() > 1 else None
    launcher = [_shorter(sys.executable)] if several is None else ["torchrun", "--nproc-per-node", several]
    program = _shorter(str(Path(__file__).with_name("run.py")))
    return shlex.join([*launcher, program, "--resume", str(out), *options])


def _shorter(path: str) -> str:
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


def how_to_continue(out: Path, *options: str) -> str:
    """The last good checkpoint of a run that has stopped, and the command that goes on from it; in one line."""
    step = checkpoint.step_of(out)
    if not out.is_dir():
        return f"{out} is not there. Once it is: {resume_command(out, *options)}"
    if step is None:
        return f"That was before the first checkpoint: {out} cannot be continued."
    return f"The checkpoint of step {step} is whole. To continue from it: {resume_command(out, *options)}"
