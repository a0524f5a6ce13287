"""A tiny sweep of two conditions, trained once in a process for all the tests that look at one."""

import json
import os
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import hostile
import pytest
from forked_runs import forked
from tiny_run import MODEL, TRAINING, text

from looped.command_line import command_line
from train.paper import sweep
from train.paper.__main__ import main
from train.paper.options import split_words
from train.paper.plan import SweepConfig, Task, plan
from train.run import main as train_main

NAMES = ("terminal-rmsnorm", "per-loop-rmsnorm")
PROGRAM = [sys.executable, "-m", "train.paper"]


def training_words(directory: Path, *options: str, extra: tuple[str, ...] = ()) -> list[str]:
    """Options that train models of four loops for 8 steps on many short documents, with all files in ``directory``."""
    data = directory / "text.jsonl"
    if not data.exists():
        data.write_text("".join(json.dumps({"text": text(60, seed)}) + "\n" for seed in range(120)), encoding="utf-8")
    steps = TRAINING.index("--steps")
    training = TRAINING[:steps] + TRAINING[steps + 2 :]
    paths = ["--cache", str(directory / "cache"), "--device", "cpu", "--dtype", "fp32"]
    return ["--steps", "8", "--data", str(data), *options, "--", *paths, *MODEL, *training, "--n-loops", "4", *extra]


def sweep_words(directory: Path, *options: str, extra: tuple[str, ...] = ()) -> list[str]:
    """The command line of the sweep, into ``directory``."""
    own = ["sweep", "--out", str(directory / "sweep"), "--conditions", *NAMES, "--seeds", "7"]
    return [*own, *training_words(directory, *options, extra=extra)]


def tasks_of(words: list[str]) -> list[Task]:
    own, extra = split_words(words[1:])
    return plan(command_line(own, SweepConfig()), extra)


def assert_rejected(argv: list[str], message: str, capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    hostile.assert_rejected(main, argv, directory, message, capsys)


class ForkedRun:
    """A run that the sweep starts: all that the sweep wants of subprocess.Popen, as a fork."""

    def __init__(self, command: list[str], stdout: BinaryIO, env: dict[str, str], **_: object) -> None:
        assert command[:2] == [sys.executable, str(sweep.PROGRAM)]

        def run() -> int:
            os.environ |= env
            return train_main(command[2:])

        self.pid, self.code = forked(run, stdout.fileno(), stdout.fileno()), None

    def poll(self, options: int = os.WNOHANG) -> int | None:
        if self.code is None:
            ended, status = os.waitpid(self.pid, options)
            self.code = os.waitstatus_to_exitcode(status) if ended else None
        return self.code

    def wait(self) -> int | None:
        return self.poll(0)

    def send_signal(self, signum: int) -> None:
        os.kill(self.pid, signum)


def main_of_forks(words: list[str]) -> int:
    """``python -m train.paper`` whose runs are forks of this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "subprocess", SimpleNamespace(Popen=ForkedRun, DEVNULL=None, STDOUT=None))
        return main(words)


def finished_sweep(factory: pytest.TempPathFactory) -> Path:
    """A directory with a finished sweep in it, which tests copy, and in printed.txt what the program printed."""
    directory = factory.getbasetemp() / "finished-sweep"
    finished = directory / "finished"
    if not finished.exists():
        shutil.rmtree(directory, ignore_errors=True)  # of one that failed
        directory.mkdir()
        with open(directory / "printed.txt", "w") as printed, redirect_stdout(printed), redirect_stderr(printed):
            assert main_of_forks(sweep_words(directory)) == 0
        finished.touch()
    return directory
