"""The paper's conditions, each trained with several seeds: ``python -m train.paper sweep``.

Every run is a process of ``train/run.py`` with a directory and a log of its own, ``OUT/<condition>/seed-<seed>[.log]``.
Given again, the command skips what is complete, continues what has a checkpoint and begins the rest. The tables are
made by sweep_report.py. What follows `` -- `` on the command line goes to every run.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from looped.command_line import command_line
from looped.run_directory import hold
from train.config import TrainConfig
from train.interrupt import Interrupted, Interruptions
from train.paper import judging
from train.paper.conditions import N_LOOPS
from train.paper.options import split_words
from train.paper.plan import EXECUTION, SWEEP, SweepConfig, Task, check_runs, check_same, options_of, plan
from train.paper.runs import FoundRun, RunResult, read_run, status
from train.paper.sweep_report import write_report
from train.prepare import load_source

PROGRAM = Path(__file__).parents[1] / "run.py"  # by its path: of this checkout, whatever else is installed
UNFINISHED_FILES = {"config.json", "tokenizer.json", "metrics.jsonl", "validation.safetensors", "checkpoint.new"}
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Child:
    """A run in training."""

    task: Task
    process: subprocess.Popen[bytes]


def run(words: Sequence[str], interruptions: Interruptions) -> int:
    """Train what ``words`` ask for, and judge the paper's claims by it if they ask for that.

    Returns the exit code: 0, also if runs diverged; 1 if a run failed. Raises ValueError for bad input, before anything
    is trained, and Interrupted after a signal.
    """
    own, extra = split_words(words)
    config = command_line(own, SweepConfig(), " ".join(SWEEP))
    if config.report_only:
        _report_only(config)
        return _judge(config)
    tasks = plan(config, extra)
    check_same(config.out, tasks[0].config)
    _check_claims(config, tasks[0].config)
    _make_cache(tasks)
    with _held(config.out) as locks:
        _check_removable(tasks)
        code = _sweep(config, tasks, locks, interruptions, [*SWEEP, *words])
    return code or _judge(config)


def _judge(config: SweepConfig) -> int:
    """The claims, if they are asked for. Returns the exit code."""
    return 0 if config.claims is None else judging.run(_claims_words(config))


def _claims_words(config: SweepConfig) -> list[str]:
    """The options with which the claims are judged."""
    seeds = map(str, config.seeds)
    return ["--runs", str(config.out), "--out", str(config.claims), "--jobs", str(config.jobs), "--seeds", *seeds]


def _check_claims(config: SweepConfig, trained: TrainConfig) -> None:
    """What would have the claims fail once everything is trained. Raises ValueError."""
    if config.claims is None:
        return
    judging.parse(_claims_words(config))
    if trained.n_loops != N_LOOPS:
        raise ValueError(f"n_loops must be {N_LOOPS}, the paper's, for --claims. Got n_loops={trained.n_loops}.")


def _report_only(config: SweepConfig) -> None:
    check_runs(config.out)
    results = write_report(config.out)
    if not results:
        raise ValueError(f"out must hold the runs of a sweep. {config.out} has no <condition>/seed-<seed>/.")
    print(f"{sum(result.status == 'complete' for result in results)} complete runs: {config.out / 'sweep.md'}")


@contextmanager
def _held(out: Path) -> Iterator[list[int]]:
    """Hold ``out`` for this sweep; gives the descriptors that its runs inherit.

    So the lock lasts as long as any of them, should the sweep be killed. Raises ValueError if another sweep, or a run
    of one, has it.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = hold(out)
    try:
        yield [] if lock is None else [lock]
    finally:
        if lock is not None:
            os.close(lock)


def _sweep(
    config: SweepConfig, tasks: list[Task], locks: list[int], interruptions: Interruptions, command: list[str]
) -> int:
    """Train what is not complete. Returns the exit code; raises Interrupted after a signal."""
    waiting = _waiting(tasks)
    print(f"{len(tasks)} runs into {config.out}: {len(tasks) - len(waiting)} done, {len(waiting)} to train", flush=True)
    started, ended, failed = time.monotonic(), 0, 0

    def on_end(child: Child) -> None:
        nonlocal ended, failed
        ended += 1
        left = len(waiting) - ended
        minutes = (time.monotonic() - started) / ended * left / 60
        done = f"{len(tasks) - left} of {len(tasks)} done" + (f", about {_duration(minutes)} left" if left else "")
        result = read_run(FoundRun(child.task.condition, child.task.seed, child.task.directory))
        failed += result.status not in ("complete", "diverged")
        print(f"{child.task.name} {_outcome(result, child)}  {done}", flush=True)
        write_report(config.out, command)

    with interruptions.deferred():
        _train_all(waiting, config.jobs, locks, interruptions, on_end)
    write_report(config.out, command)
    if interruptions.pending is not None:
        raise Interrupted(interruptions.pending)
    print(f"tables and figure: {config.out / 'sweep.md'}")
    return 1 if failed else 0


def _waiting(tasks: Sequence[Task]) -> list[Task]:
    return [task for task in tasks if status(task.directory) not in ("complete", "diverged")]


def _make_cache(tasks: Sequence[Task]) -> None:
    """Train the tokenizer and encode the text once, here, so that runs that begin together only read them.

    Raises ValueError for text that cannot be used, before there is a directory of the sweep.
    """
    if not _waiting(tasks):
        return
    load_source(tasks[0].config)


def _train_all(
    tasks: Iterable[Task], jobs: int, locks: list[int], interruptions: Interruptions, on_end: Callable[[Child], None]
) -> None:
    """Train ``jobs`` tasks at a time until none is left or a signal is pending; then stop those that are running."""
    waiting, children = list(tasks), dict[int, Child]()
    try:
        while (waiting or children) and interruptions.pending is None:
            for slot in range(jobs):
                if slot not in children and waiting:
                    children[slot] = _start(waiting.pop(0), slot, jobs, locks)
            for slot, child in list(children.items()):
                if child.process.poll() is not None:
                    del children[slot]
                    on_end(child)
            time.sleep(POLL_SECONDS)
    finally:
        _stop(children.values())


def _start(task: Task, slot: int, jobs: int, locks: list[int]) -> Child:
    """Begin a run, or continue it from its checkpoint."""
    state = status(task.directory)
    if state == "unfinished":
        _remove(task)
    options = [*task.options, "--out", str(task.directory)]
    if state == "checkpoint":
        print(f"{task.name} is continued", flush=True)
        carried = {name: getattr(task.config, name) for name in sorted(EXECUTION - {"resume", "cache"})}
        options = ["--resume", str(task.directory), *options_of(carried)]
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with open(task.log, "ab") as log:
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM), *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | _share(slot, jobs, task.config),
            pass_fds=locks,
            process_group=0,  # Ctrl-C reaches the sweep alone, which passes it on once
        )
    return Child(task, process)


def _check_removable(tasks: Sequence[Task]) -> None:
    """Raises ValueError if a directory that is not known as a run's holds something that no run has written."""
    for task in tasks:
        if status(task.directory) != "unfinished":
            continue
        foreign = {path.name.removesuffix(".new") for path in task.directory.iterdir()} - {
            name.removesuffix(".new") for name in UNFINISHED_FILES
        }
        if foreign:
            raise ValueError(f"out must hold nothing but runs. {task.directory} holds {', '.join(sorted(foreign))}.")


def _remove(task: Task) -> None:
    """Remove a run that was stopped before its first checkpoint."""
    _check_removable([task])
    shutil.rmtree(task.directory)
    print(f"{task.name} had no checkpoint yet: removed, begun again", flush=True)


def _share(slot: int, jobs: int, config: TrainConfig) -> dict[str, str]:
    """The environment variables that give one of several jobs its part of the machine."""
    if jobs == 1:
        return {}
    share = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs))}
    if config.device != "cpu" and torch.cuda.is_available():
        devices = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        names = devices.split(",")
        share["CUDA_VISIBLE_DEVICES"] = names[slot % len(names)]
    return share


def _stop(children: Iterable[Child]) -> None:
    """Have the runs write their checkpoints and wait for them; a second signal has them stop at once."""
    running = list(children)
    if running:
        print(f"stopping {len(running)} running", flush=True)
    try:
        _terminate(running)
    except Interrupted:
        _terminate(running)


def _terminate(children: list[Child]) -> None:
    for child in children:
        child.process.send_signal(signal.SIGTERM)
    for child in children:
        child.process.wait()


def _outcome(result: RunResult, child: Child) -> str:
    if result.status == "complete":
        last = len(result.evaluation)
        return f"PPL {result.ppl:<8.4g} ||H_{last}|| {result.state_norm:<9,.4g} {result.minutes:5.1f} min"
    if result.status == "diverged":
        return f"diverged at step {result.steps} {result.minutes:5.1f} min"
    return f"failed (exit {child.process.returncode}, see {child.task.log}): {_last_line(child.task.log)}"


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "no output")


def _duration(minutes: float) -> str:
    return f"{round(minutes) // 60} h {round(minutes) % 60:02d} min" if minutes >= 60 else f"{minutes:.0f} min"
