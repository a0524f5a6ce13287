"""Runs whose output nobody reads, whose files cannot be written, or whose system has not all that POSIX has."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import arguments

from train.metrics import read_metrics

ROOT = Path(__file__).parents[1]
FINISHED = {"config.json", "tokenizer.json", "metrics.jsonl", "checkpoint", "summary.json", "report.png"}


def run_program(argv: list[str], *, before: str = "", shell: str = "", cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """``train.run.main(argv)`` in a process of its own, after the Python ``before``, in the shell's redirections."""
    script = f"{before}\nimport sys\nfrom train.run import main\nsys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = ["bash", "-c", f'"$0" "$@" {shell}', sys.executable, "-c", script, *argv]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("shell", "message"),
    [
        ("| head -n 2; exit ${PIPESTATUS[0]}", "standard output cannot be written (Broken pipe). The run goes on.\n"),
        ("> /dev/full", "standard output cannot be written (No space left on device). The run goes on.\n"),
        ("> /dev/full 2>&1", ""),
        ("2>&1 | head -n 1; exit ${PIPESTATUS[0]}", ""),
        (">&- 2>&-", ""),
        ("2>&-", ""),
    ],
)
def test_a_run_outlasts_its_output(tmp_path, shell, message):
    run = tmp_path / "run"
    done = run_program(arguments(tmp_path, "--out", str(run), "--steps", "4"), shell=shell)
    assert (done.returncode, done.stderr) == (0, message)
    assert {path.name for path in run.iterdir()} >= FINISHED
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4]


LIMIT = """
import resource
from train import trainer
def limited(function):
    def wrapped(run, *rest):
        if run.step >= 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
        return function(run, *rest)
    return wrapped
"""


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
def test_a_full_disk_is_one_line_that_says_how_to_go_on(tmp_path, options, function, message, last):
    run = tmp_path / "run"
    before = f"{LIMIT}trainer.{function} = limited(trainer.{function})"
    done = run_program(arguments(tmp_path, "--out", str(run), *options.split()), before=before)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
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
    command = rest.partition("continue from it: ")[2]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    again = subprocess.run(command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert read_metrics(run / "metrics.jsonl")[-1]["step"] == 8


def test_a_directory_that_cannot_be_filled_is_left_as_it_was(tmp_path):
    (tmp_path / "empty").mkdir()
    argv = arguments(tmp_path, "--steps", "1")
    assert run_program([*argv, "--out", str(tmp_path / "ok")]).returncode == 0  # its text is in the cache now
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))"
    for name in ("empty", "new"):
        done = run_program([*argv, "--out", str(tmp_path / name)], before=limit)
        assert done.returncode == 2
        assert re.fullmatch(rf"error: out directory .*{name} is not writable \(.*large: '.*'\)\.\n", done.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "empty", "ok", "text.txt"]
    assert not any((tmp_path / "empty").iterdir())


def test_a_system_without_posix(tmp_path):
    """As on Windows: no fcntl, no resource."""
    before = "import sys\nsys.modules['fcntl'] = sys.modules['resource'] = None"
    argv = arguments(tmp_path, "--steps", "3", "--out", str(tmp_path / "run"))
    assert run_program(argv, before=before).returncode == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["peak_memory_bytes"] is None
    assert run_program(["--resume", str(tmp_path / "run"), "--steps", "4"], before=before).returncode == 0


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_files_have_the_modes_that_the_umask_leaves(tmp_path, umask):
    before = f"import os\nos.umask({umask})"
    assert (
        run_program(arguments(tmp_path, "--steps", "2", "--out", str(tmp_path / "run")), before=before).returncode == 0
    )
    for path in (tmp_path / "run", *(tmp_path / "run").rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path
