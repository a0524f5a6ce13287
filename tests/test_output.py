"""Runs whose output nobody reads, or whose files cannot be written."""

import json
import os
import re
import resource
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from forked_runs import ended, forked, run_forked
from tiny_run import arguments

from train import trainer
from train.gate import main as gate
from train.metrics import read_metrics
from train.paper.__main__ import main as paper
from train.run import main

PROGRAM = Path(__file__).parents[1] / "train" / "run.py"
FINISHED = {"config.json", "tokenizer.json", "metrics.jsonl", "checkpoint", "summary.json", "report.png"}
BROKEN_PIPE = "standard output cannot be written (Broken pipe). The run goes on.\n"
NO_SPACE = "standard output cannot be written (No space left on device). The run goes on.\n"


def assert_finished(run: Path) -> None:
    assert {path.name for path in run.iterdir()} >= FINISHED
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_program_outlasts_its_output(tmp_path):
    argv = arguments(tmp_path, "--out", str(tmp_path / "run"), "--steps", "4")
    command = f"{shlex.join([sys.executable, str(PROGRAM), *argv])} | head -n 2; exit ${{PIPESTATUS[0]}}"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, BROKEN_PIPE)
    assert_finished(tmp_path / "run")


def opened(place: str) -> int | None:
    """A descriptor to write to, or None, which is a closed one."""
    if place == "closed":
        return None
    if place != "unread pipe":
        return os.open(place, os.O_WRONLY | os.O_CREAT)
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize(
    ("stdout", "stderr", "message"),
    [
        ("unread pipe", "said", BROKEN_PIPE),
        ("/dev/full", "said", NO_SPACE),
        ("/dev/full", "/dev/full", ""),
        ("unread pipe", "unread pipe", ""),
        ("closed", "closed", ""),
        ("/dev/null", "closed", ""),
    ],
)
def test_a_run_outlasts_its_output(tmp_path, monkeypatch, stdout, stderr, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "said").touch()
    argv = arguments(tmp_path, "--out", str(tmp_path / "run"), "--steps", "4")
    assert ended([forked(lambda: main(argv), opened(stdout), opened(stderr))], Path("said").read_text) == [0]
    assert (tmp_path / "said").read_text() == message
    assert_finished(tmp_path / "run")


def test_other_programs_outlast_theirs(tmp_path):
    """A gate is trained before its numbers are printed, and written after; a sweep takes hours."""
    run, log = tmp_path / "run", tmp_path / "said"
    assert main(arguments(tmp_path, "--out", str(run), "--steps", "1")) == 0
    for program in (lambda: gate([str(run), "--steps", "1", "--device", "cpu"]), lambda: paper(["--help"])):
        with open(log, "wb") as stderr:
            assert ended([forked(program, opened("/dev/full"), stderr.fileno())], log.read_text) == [0]
        assert log.read_text() == NO_SPACE
    assert (tmp_path / "run-gate" / "gate.json").exists()


def limited(function):
    """``function`` of a run, from step 5 on with no file above 200 bytes."""

    def wrapped(run, *rest):
        if run.step >= 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
        return function(run, *rest)

    return wrapped


@pytest.mark.parametrize(
    ("options", "function", "message", "last"),
    [
        ("--log-every 1 --save-every 2", "_step", r"step 6 of 8: \[Errno 27\] File too large: '.*metrics.jsonl'\. ", 4),
        (
            "--log-every 7 --save-every 3",
            "_step",
            r"step 6 of 8: .*checkpoint.new could not be written \(.*?large.*?\)\. ",
            3,
        ),
        (
            "--log-every 8 --save-every 0",
            "_evaluate",
            r"step 8 of 8: \[Errno 27\] File too large: '.*report.png'\. ",
            8,
        ),
        (
            "--log-every 8 --save-every 0",
            "save",
            r"step 8 of 8: .*checkpoint.new could not be written \(.*?\)\. ",
            None,
        ),
    ],
)
def test_a_full_disk_is_one_line_that_says_how_to_go_on(tmp_path, monkeypatch, options, function, message, last):
    run = tmp_path / "run"
    argv = arguments(tmp_path, "--out", str(run), *options.split())
    with monkeypatch.context() as patch:
        patch.setattr(trainer, function, limited(getattr(trainer, function)))
        code, error = run_forked(lambda: main(argv))
    assert code == 1
    (line,) = error.splitlines()
    found = re.match(f"error: {message}", line)
    assert found, line
    assert {path.name for path in run.iterdir()} <= FINISHED | {"validation.safetensors"}
    assert not list(run.rglob("*.new"))
    if last is None:
        assert line[found.end() :] == f"That was before the first checkpoint: {run} cannot be continued."
        return
    assert json.loads((run / "checkpoint" / "checkpoint.json").read_text())["step"] == last
    rest = line[found.end() :]
    assert rest.startswith(f"The checkpoint of step {last} is whole. To continue from it: ")
    interpreter, program, *argv = shlex.split(rest.partition("continue from it: ")[2])
    assert Path(interpreter).absolute() == Path(sys.executable)
    assert Path(program).resolve() == PROGRAM
    assert main(argv) == 0
    assert read_metrics(run / "metrics.jsonl")[-1]["step"] == 8


def test_a_directory_that_cannot_be_filled_is_left_as_it_was(tmp_path):
    (tmp_path / "empty").mkdir()
    argv = arguments(tmp_path, "--steps", "1")
    assert main([*argv, "--out", str(tmp_path / "ok")]) == 0  # its text is in the cache now

    def limited_run(name: str) -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
        return main([*argv, "--out", str(tmp_path / name)])

    for name in ("empty", "new"):
        code, error = run_forked(partial(limited_run, name))
        assert code == 2
        assert re.fullmatch(rf"error: out directory .*{name} is not writable \(.*large: '.*'\)\.\n", error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "empty", "ok", "text.txt"]
    assert not any((tmp_path / "empty").iterdir())


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_files_have_the_modes_that_the_umask_leaves(tmp_path, umask):
    argv = arguments(tmp_path, "--steps", "2", "--out", str(tmp_path / "run"))
    before = os.umask(umask)
    try:
        assert main(argv) == 0
    finally:
        os.umask(before)
    for path in (tmp_path / "run", *(tmp_path / "run").rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path
