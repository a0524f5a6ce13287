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
from collections.abc import Collection, Generator, Sequence
from contextlib import closing
from pathlib import Path

import torch

from looped.command_line import command_line
from looped.run_directory import hold
from train.config import TrainConfig
from train.interrupt import Interrupted, Interruptions
from train.paper import judging
from train.paper.conditions import N_LOOPS
from train.paper.options import split_words
from train.paper.plan import SWEEP, SweepConfig, Task, options_of, plan
from train.paper.runs import EXECUTION, RunResult, check_alike, complete_runs, read_run
from train.paper.sweep_report import write_report
from train.prepare import load_source

PROGRAM = Path(__file__).parents[1] / "run.py"  # by its path: of this checkout, whatever else is installed
UNFINISHED_FILES = {"config.json", "tokenizer.json", "metrics.jsonl", "validation.safetensors", "checkpoint"}
POLL_SECONDS = 0.2

Process = subprocess.Popen[bytes]


def run(words: Sequence[str], interruptions: Interruptions) -> int:
    """Train what ``words`` ask for, and judge the paper's claims by it if they ask for that.

    Returns the exit code: 0, also if runs diverged; 1 if a run failed. Raises ValueError for bad input, before anything
    is trained, and Interrupted after a signal.
    """
    sweep_words, extra = split_words(words)
    config = command_line(sweep_words, SweepConfig(), " ".join(SWEEP))
    if config.report_only:
        check_alike(config.out)
        results = write_report(config.out)
        if not results:
            raise ValueError(f"out must hold the runs of a sweep. {config.out} has no <condition>/seed-<seed>/.")
        print(f"{len(complete_runs(results))} complete runs: {config.out / 'sweep.md'}")
        return _judge(config)
    tasks = plan(config, extra)
    check_alike(config.out, tasks[0].config)
    if config.claims is not None:  # what would have them fail once everything is trained
        judging.parse(_claims_words(config))
        if (n_loops := tasks[0].config.n_loops) != N_LOOPS:
            raise ValueError(f"n_loops must be {N_LOOPS}, the paper's, for --claims. Got n_loops={n_loops}.")
    if _waiting(tasks):
        # Trains the tokenizer and encodes the text once, so that runs that begin together only read them. Text that
        # cannot be used is found before there is a directory of the sweep.
        load_source(tasks[0].config)
    config.out.mkdir(parents=True, exist_ok=True)
    # The runs inherit the lock, which so lasts as long as any of them, should the sweep be killed.
    lock = hold(config.out)
    try:
        for task in tasks:
            _check_removable(task)
        code = _sweep(config, tasks, [] if lock is None else [lock], interruptions, [*SWEEP, *words])
    finally:
        if lock is not None:
            os.close(lock)
    return code or _judge(config)


def _judge(config: SweepConfig) -> int:
    """The claims, if they are asked for. Returns the exit code."""
    return 0 if config.claims is None else judging.run(_claims_words(config))


def _claims_words(config: SweepConfig) -> list[str]:
    """The options with which the claims are judged."""
    seeds = map(str, config.seeds)
    return ["--runs", str(config.out), "--out", str(config.claims), "--jobs", str(config.jobs), "--seeds", *seeds]


def _sweep(
    config: SweepConfig, tasks: list[Task], locks: list[int], interruptions: Interruptions, command: list[str]
) -> int:
    """Train what is not complete. Returns the exit code; raises Interrupted after a signal."""
    waiting = _waiting(tasks)
    left, failed, started = len(waiting), 0, time.monotonic()
    print(f"{len(tasks)} runs into {config.out}: {len(tasks) - left} done, {left} to train", flush=True)
    with interruptions.deferred(), closing(_train(waiting, config.jobs, locks, interruptions)) as ended:
        for task, code in ended:
            left -= 1
            minutes = (time.monotonic() - started) / 60 / (len(waiting) - left) * left
            done = f"{len(tasks) - left} of {len(tasks)} done" + (f", about {_duration(minutes)} left" if left else "")
            result = read_run(task.run)
            failed += result.status not in ("complete", "diverged")
            print(f"{task.name} {_outcome(result, task, code)}  {done}", flush=True)
            write_report(config.out, command)
    write_report(config.out, command)
    if interruptions.pending is not None:
        raise Interrupted(interruptions.pending)
    print(f"tables and figure: {config.out / 'sweep.md'}")
    return 1 if failed else 0


def _waiting(tasks: Sequence[Task]) -> list[Task]:
    return [task for task in tasks if task.run.status not in ("complete", "diverged")]


def _train(
    tasks: Sequence[Task], jobs: int, locks: list[int], interruptions: Interruptions
) -> Generator[tuple[Task, int], None, None]:
    """Train ``jobs`` tasks at a time; gives each that has ended and its exit code. Ends when none is left, or when a
    signal is pending, and stops those that are running then."""
    waiting, running = list(tasks), dict[int, tuple[Task, Process]]()
    try:
        while (waiting or running) and interruptions.pending is None:
            for slot in range(jobs):
                if slot not in running and waiting:
                    task = waiting.pop(0)
                    running[slot] = task, _start(task, slot, jobs, locks)
            for slot, (task, process) in list(running.items()):
                code = process.poll()
                if code is not None:
                    del running[slot]
                    yield task, code
            time.sleep(POLL_SECONDS)
    finally:
        _stop([process for _, process in running.values()])


def _start(task: Task, slot: int, jobs: int, locks: list[int]) -> Process:
    """Begin a run, or continue it from its checkpoint."""
    run, status = task.run, task.run.status
    options = [*task.options, "--out", str(run.directory)]
    if status == "unfinished":
        _check_removable(task)
        shutil.rmtree(run.directory)
        print(f"{task.name} had no checkpoint yet: removed, begun again", flush=True)
    elif status == "checkpoint":
        print(f"{task.name} is continued", flush=True)
        carried = {name: getattr(task.config, name) for name in sorted(EXECUTION - {"resume", "cache"})}
        options = ["--resume", str(run.directory), *options_of(carried)]
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with open(run.log, "ab") as log:
        return subprocess.Popen(
            [sys.executable, str(PROGRAM), *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | _share(slot, jobs, task.config),
            pass_fds=locks,
            process_group=0,  # Ctrl-C reaches the sweep alone, which passes it on once
        )


def _check_removable(task: Task) -> None:
    """Raise ValueError if a run that was stopped before its first checkpoint has a directory with other files in it."""
    if task.run.status != "unfinished":
        return
    directory = task.run.directory
    foreign = {path.name.removesuffix(".new") for path in directory.iterdir()} - UNFINISHED_FILES
    if foreign:
        raise ValueError(f"out must hold nothing but runs. {directory} holds {', '.join(sorted(foreign))}.")


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


def _stop(processes: Collection[Process]) -> None:
    """Have runs write their checkpoints and wait for them; a second signal has them stop at once."""
    if processes:
        print(f"stopping {len(processes)} running", flush=True)
    try:
        _terminate(processes)
    except Interrupted:
        _terminate(processes)


def _terminate(processes: Collection[Process]) -> None:
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        process.wait()


def _outcome(result: RunResult, task: Task, code: int) -> str:
    if result.status == "complete":
        last = len(result.evaluation)
        return f"PPL {result.ppl:<8.4g} ||H_{last}|| {result.state_norm:<9,.4g} {result.minutes:5.1f} min"
    if result.status == "diverged":
        return f"diverged at step {result.steps} {result.minutes:5.1f} min"
    lines = task.run.log.read_text(errors="replace").split("\n")
    last_line = next((line for line in reversed(lines) if line.strip()), "no output")
    return f"failed (exit {code}, see {task.run.log}): {last_line}"


def _duration(minutes: float) -> str:
    return f"{round(minutes) // 60} h {round(minutes) % 60:02d} min" if minutes >= 60 else f"{minutes:.0f} min"
