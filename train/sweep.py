"""The paper's conditions, each trained with several seeds: ``python train/sweep.py``.

Every run is a process of ``train/run.py`` with a directory and a log of its own, ``OUT/<condition>/seed-<seed>[.log]``.
Given again, the command skips what is complete, continues what has a checkpoint and begins the rest. The tables are
made by sweep_report.py. What follows `` -- `` on the command line goes to every run.
"""

import dataclasses
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, get_args

import torch

from train.config import RESUMABLE, TrainConfig, read_config, validate
from train.corpus import load_corpus
from train.data import cache_directory, load_data
from train.interrupt import Interrupted, Interruptions
from train.run import command_line, parse
from train.sweep_report import RunResult, find_runs, read_run, status, write_report

Condition = Literal[
    "terminal-rmsnorm", "terminal-raw", "per-loop-rmsnorm", "per-loop-raw", "per-loop-final-only",
    "terminal-rmsnorm-penalty", "per-loop-rmsnorm-penalty", "per-loop-layernorm", "per-loop-rmsnorm-loop-norm",
]  # fmt: skip
PENALTY = 0.01  # lambda of the norm penalty in Sharma & Vu (arXiv 2606.24898)


def _condition(supervision: str, readout: str, penalty: float = 0.0, inter_loop_norm: bool = False) -> dict[str, Any]:
    return dict(supervision=supervision, readout=readout, penalty=penalty, inter_loop_norm=inter_loop_norm)


# The fields of TrainConfig in which the conditions differ: the paper's two loss placements by two readouts, its
# remedies, and two controls, a second readout that is blind to scale and a recurrence that removes it.
CONDITIONS: dict[Condition, dict[str, Any]] = {
    "terminal-rmsnorm": _condition("terminal", "rmsnorm"),
    "terminal-raw": _condition("terminal", "raw"),
    "per-loop-rmsnorm": _condition("per-loop", "rmsnorm"),
    "per-loop-raw": _condition("per-loop", "raw"),
    "per-loop-final-only": _condition("per-loop", "final-only"),
    "terminal-rmsnorm-penalty": _condition("terminal", "rmsnorm", penalty=PENALTY),
    "per-loop-rmsnorm-penalty": _condition("per-loop", "rmsnorm", penalty=PENALTY),
    "per-loop-layernorm": _condition("per-loop", "layernorm"),
    "per-loop-rmsnorm-loop-norm": _condition("per-loop", "rmsnorm", inter_loop_norm=True),
}

# What the sweep itself sets in every run, and what two runs of one sweep may differ in: how they are carried out.
OWN_OPTIONS = {"preset", "data", "steps", "epochs", "supervision", "readout", "penalty", "inter-loop-norm", "seed",
               "out", "resume"}  # fmt: skip
EXECUTION = set(RESUMABLE) - {"steps", "epochs", "eval_tokens"}
UNFINISHED_FILES = {"config.json", "tokenizer.json", "metrics.jsonl", "validation.safetensors", "checkpoint.new"}
PROGRAM = Path(__file__).with_name("run.py")
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class SweepConfig:
    """Train every condition with every seed and put the results side by side. Options after -- go to train/run.py."""

    out: Path = Path("runs/sweep")
    """Directory of the sweep."""
    preset: Literal["demo", "paper-44m", "paper-129m"] = "demo"
    """Model and training; demo trains on two CPU cores."""
    conditions: tuple[Condition, ...] = get_args(Condition)
    """Which conditions to train."""
    seeds: tuple[int, ...] = (42, 101, 202)
    """Which seeds; every condition is trained with the first one before any is with the second."""
    steps: int | None = None
    """Optimisation steps of a run. None: the preset's length."""
    epochs: float | None = None
    """Passes over the training windows, instead of steps."""
    data: str | None = None
    """sotu, wikitext-103, or a path or (quoted) glob. None: the preset's."""
    jobs: int = 1
    """Runs at a time. They share the CPU's threads; with CUDA each sees one device, in turn."""
    report_only: bool = False
    """Train nothing; write the tables and the figure again."""


@dataclass(frozen=True)
class Task:
    """A run that is to be trained, and the options of train/run.py that do so from the start."""

    condition: Condition
    seed: int
    directory: Path
    config: TrainConfig
    options: list[str]

    @property
    def name(self) -> str:
        return f"{self.condition:<26} seed {self.seed:<5}"

    @property
    def log(self) -> Path:
        return self.directory.with_name(f"seed-{self.seed}.log")


@dataclass(frozen=True)
class Child:
    """A run in training."""

    task: Task
    process: subprocess.Popen[bytes]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's).

    Returns the exit code: 0, also if runs diverged; 1 if a run failed; 2 after one line on stderr if the input is bad;
    128 + n if signal n stopped the sweep.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    own, extra = (words, []) if "--" not in words else (words[: words.index("--")], words[words.index("--") + 1 :])
    with Interruptions().installed() as interruptions:
        try:
            config = command_line(own, SweepConfig(), "train/sweep.py")
            if config.report_only:
                return _report_only(config)
            tasks = plan(config, extra)
            check_same(config.out, tasks[0].config)
            with _locked(config.out) as lock:
                return _sweep(config, tasks, lock, interruptions)
        except (ValueError, OSError) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        except Interrupted as interrupted:
            print(f"\nstopped. To continue:\n  {shlex.join([sys.executable, os.path.relpath(__file__), *words])}")
            return 128 + interrupted.signum


def plan(config: SweepConfig, extra: Sequence[str] = ()) -> list[Task]:
    """The runs of a sweep, in order: seeds outside, conditions inside, so that what is done first compares.

    ``extra``: further options of train/run.py. Raises ValueError naming the option, the rule and the value.
    """
    for name in ("conditions", "seeds"):
        values = getattr(config, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} must be at least one, and each only once. Got {' '.join(map(str, values))}.")
    if config.jobs < 1:
        raise ValueError(f"jobs must be at least 1. Got jobs={config.jobs}.")
    for word in extra:
        name = word.partition("=")[0].removeprefix("--").removeprefix("no-").replace("_", "-")
        if word.startswith("--") and name in OWN_OPTIONS:
            raise ValueError(f"{word} is the sweep's own option: it cannot follow ' -- '.")
    shared = ["--preset", config.preset, *extra]
    for name in ("steps", "epochs", "data"):
        if getattr(config, name) is not None:
            shared += [f"--{name}", str(getattr(config, name))]
    base = dataclasses.replace(parse(shared), out=None)
    if config.jobs > 1 and ":" in base.device:
        raise ValueError(
            f"device must be auto, cpu or cuda with several jobs. Got device={base.device}, jobs={config.jobs}."
        )
    tasks = []
    for seed in config.seeds:
        for condition in config.conditions:
            values = CONDITIONS[condition] | {"seed": seed}
            directory = config.out / condition / f"seed-{seed}"
            run = dataclasses.replace(base, **values)
            validate(run)
            tasks.append(Task(condition, seed, directory, run, [*shared, *_options(values)]))
    return tasks


def _options(values: dict[str, Any]) -> list[str]:
    """Fields of TrainConfig as options of train/run.py."""
    words: list[str] = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


def check_same(out: Path, asked: TrainConfig) -> None:
    """Check that every run in ``out`` is what its directory says and, but for condition and seed, what ``asked`` says.

    Raises ValueError naming the first run and option that differ.
    """
    for condition, seed, directory in find_runs(out, get_args(Condition)):
        if not (directory / "config.json").exists():
            continue
        stored = _stored(directory)
        expected = dataclasses.replace(asked, seed=seed, **CONDITIONS[condition])  # type: ignore[index]
        for field in dataclasses.fields(TrainConfig):
            before, now = getattr(stored, field.name), getattr(expected, field.name)
            if field.name in ("data", "tokenizer"):
                before, now = os.path.abspath(before), os.path.abspath(now)  # config.json has paths made absolute
            if field.name not in EXECUTION | {"out"} and before != now:
                raise ValueError(
                    f"{field.name} must be that of the runs in {out}, or out another directory. "
                    f"Got {field.name}={now}; {directory} has {before}."
                )


def _stored(directory: Path) -> TrainConfig:
    try:
        return read_config(directory)
    except ValueError as error:
        raise ValueError(
            f"{directory / 'config.json'} cannot be used: remove {directory}. ({error.__cause__!r:.100})"
        ) from error


def _report_only(config: SweepConfig) -> int:
    configured = [run for _, _, run in find_runs(config.out, get_args(Condition)) if (run / "config.json").exists()]
    if configured:
        check_same(config.out, _stored(configured[0]))
    results = write_report(config.out, get_args(Condition))
    if not results:
        raise ValueError(f"out must hold the runs of a sweep. {config.out} has no <condition>/seed-<seed>/.")
    print(f"{sum(result.status == 'complete' for result in results)} complete runs: {config.out / 'sweep.md'}")
    return 0


@contextmanager
def _locked(out: Path) -> Iterator[IO[bytes]]:
    """Hold ``out`` for this sweep. Its runs inherit the lock, so that it lasts as long as any of them, should the
    sweep be killed. Raises ValueError if another sweep has it."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"out must not be in use. Another sweep, or a run of one, is at work in {out}.") from None
        yield lock


def _sweep(config: SweepConfig, tasks: list[Task], lock: IO[bytes], interruptions: Interruptions) -> int:
    """Train what is not complete. Returns the exit code; raises Interrupted after a signal."""
    waiting = [task for task in tasks if status(task.directory) not in ("complete", "diverged")]
    print(f"{len(tasks)} runs into {config.out}: {len(tasks) - len(waiting)} done, {len(waiting)} to train", flush=True)
    if waiting:
        _make_cache(waiting[0].config)
    started, ended, failed = time.monotonic(), 0, 0

    def on_end(child: Child) -> None:
        nonlocal ended, failed
        ended += 1
        left = len(waiting) - ended
        minutes = (time.monotonic() - started) / ended * left / 60
        done = f"{len(tasks) - left} of {len(tasks)} done" + (f", about {_duration(minutes)} left" if left else "")
        result = read_run(child.task.condition, child.task.seed, child.task.directory)
        failed += result.status not in ("complete", "diverged")
        print(f"{child.task.name} {_outcome(result, child)}  {done}", flush=True)
        write_report(config.out, get_args(Condition))

    with interruptions.deferred():
        _train_all(waiting, config.jobs, lock, interruptions, on_end)
    write_report(config.out, get_args(Condition))
    if interruptions.pending is not None:
        raise Interrupted(interruptions.pending)
    print(f"tables and figure: {config.out / 'sweep.md'}")
    return 1 if failed else 0


def _make_cache(config: TrainConfig) -> None:
    """Train the tokenizer and encode the text once, here, so that runs that begin together only read them."""
    load_data(
        load_corpus(config.data),
        tokenizer=config.tokenizer,
        vocab_size=config.vocab_size,
        seq_len=config.seq_len,
        cache=cache_directory(config.cache),
    )


def _train_all(
    tasks: Iterable[Task], jobs: int, lock: IO[bytes], interruptions: Interruptions, on_end: Callable[[Child], None]
) -> None:
    """Train ``jobs`` tasks at a time until none is left or a signal is pending; then stop those that are running."""
    waiting, children = list(tasks), dict[int, Child]()
    try:
        while (waiting or children) and interruptions.pending is None:
            for slot in range(jobs):
                if slot not in children and waiting:
                    children[slot] = _start(waiting.pop(0), slot, jobs, lock)
            for slot, child in list(children.items()):
                if child.process.poll() is not None:
                    del children[slot]
                    on_end(child)
            time.sleep(POLL_SECONDS)
    finally:
        _stop(children.values())


def _start(task: Task, slot: int, jobs: int, lock: IO[bytes]) -> Child:
    """Begin a run, or continue it from its checkpoint."""
    state = status(task.directory)
    if state == "unfinished":
        _remove(task)
    options = [*task.options, "--out", str(task.directory)]
    if state == "checkpoint":
        print(f"{task.name} is continued", flush=True)
        carried = {name: getattr(task.config, name) for name in sorted(EXECUTION - {"resume", "cache"})}
        options = ["--resume", str(task.directory), *_options(carried)]
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with open(task.log, "ab") as log:
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM), *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | _share(slot, jobs, task.config),
            pass_fds=[lock.fileno()],
            process_group=0,  # Ctrl-C reaches the sweep alone, which passes it on once
        )
    return Child(task, process)


def _remove(task: Task) -> None:
    """Remove a run that was stopped before its first checkpoint. Raises ValueError if the directory is no run's."""
    foreign = {path.name.removesuffix(".new") for path in task.directory.iterdir()} - {
        name.removesuffix(".new") for name in UNFINISHED_FILES
    }
    if foreign:
        raise ValueError(f"out must hold nothing but runs. {task.directory} holds {', '.join(sorted(foreign))}.")
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
        last = result.evaluation[-1]["n_loops"]
        return f"PPL {result.ppl:<8.4g} ||H_{last}|| {result.state_norm:<9,.4g} {result.minutes:5.1f} min"
    if result.status == "diverged":
        return f"diverged at step {result.steps} {result.minutes:5.1f} min"
    return f"failed (exit {child.process.returncode}, see {child.task.log}): {_last_line(child.task.log)}"


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "no output")


def _duration(minutes: float) -> str:
    return f"{round(minutes) // 60} h {round(minutes) % 60:02d} min" if minutes >= 60 else f"{minutes:.0f} min"


if __name__ == "__main__":
    sys.exit(main())
