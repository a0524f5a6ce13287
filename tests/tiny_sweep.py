"""A tiny sweep of two conditions, trained once in a process for all the tests that look at one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import MODEL, TRAINING, text

from looped.command_line import command_line
from train.paper.__main__ import main
from train.paper.options import split_words
from train.paper.plan import SweepConfig, Task, plan

NAMES = ("terminal-rmsnorm", "per-loop-rmsnorm")
PROGRAM = [sys.executable, "-m", "train.paper"]
CHECKOUT = str(Path(__file__).parents[1])
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": CHECKOUT}


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
    """One line on stderr, exit code 2, and ``directory`` as it was, or still not there."""
    before = contents(directory)
    capsys.readouterr()
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]+\n", error), error
    assert re.search(message, error), error
    assert contents(directory) == before


def contents(directory: Path) -> dict[str, bytes] | None:
    if not directory.exists():
        return None
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def finished_sweep(factory: pytest.TempPathFactory) -> Path:
    """A directory with a finished sweep in it, which tests copy, and in printed.txt what the program printed."""
    directory = factory.getbasetemp() / "finished-sweep"
    if not directory.exists():
        directory.mkdir()
        command = [*PROGRAM, *sweep_words(directory)]
        done = subprocess.run(command, cwd=directory, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stderr == ""
        (directory / "printed.txt").write_text(done.stdout)
    return directory
