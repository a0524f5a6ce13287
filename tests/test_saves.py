"""Runs whose files cannot be written: on a disk that is full, read-only or gone, and with what is to be done then."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
from forked_runs import ended, finish, start
from test_trainer import assert_same_run
from tiny_run import arguments

from train import checkpoint, checkpoint_writer, processes, trainer
from train.checkpoint import step_of
from train.interrupt import Interrupted
from train.metrics import MetricsLog, read_metrics
from train.run import main
from train.saves import Saves

pytestmark = pytest.mark.usefixtures("no_picture")
FINISHED = ["checkpoint", "config.json", "metrics.jsonl", "report.png", "summary.json", "tokenizer.json"]
NO_SPACE = r"(?=.*checkpoint\.new).*No space left on device.*"
GOES_ON = r"\. Training goes on, and tries again later\. Saves that failed: (\d+)\."


def may_mount() -> bool:
    """Whether this user may have a file system of its own."""
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def troubled(tmp_path_factory) -> dict[str, dict]:
    if not may_mount():
        pytest.skip("no file system of its own for a process here")
    disk, program = tmp_path_factory.mktemp("disk"), str(Path(__file__).with_name("disk_trouble.py"))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = ["unshare", "-rm", sys.executable, program, str(disk)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def lines_of(found: dict) -> list[str]:
    return found["said"].splitlines()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("full", f"step 6 of 8: .*{NO_SPACE}"),
        ("read-only", r"step 5 of 8: \[Errno 30\] Read-only file system: '.*metrics.jsonl'"),
    ],
)
def test_a_run_stops_with_its_last_checkpoint(troubled, kind, message):
    found = troubled[f"{kind}, stop"]
    assert (found["code"], found["step"]) == (1, 4)
    (line,) = lines_of(found)
    assert re.match(rf"error: {message}\. The checkpoint of step 4 is whole\. To continue from it: ", line), line
    assert found["names"] == [*FINISHED[:3], "tokenizer.json", "validation.safetensors"]


def test_a_directory_that_is_gone_is_not_made_anew(troubled):
    found = troubled["gone, stop"]
    (line,) = lines_of(found)
    assert re.match(r"error: step 5 of 8: \[Errno 2\] No such file or directory: '.*metrics.jsonl'\. ", line)
    assert line.endswith(f"{found['run']} is not there. Once it is: {line.partition('Once it is: ')[2]}")
    assert (found["code"], found["step"]) == (1, 4)


@pytest.mark.parametrize(
    ("kind", "failed"), [("full", 1), ("read-only", 5), ("gone", 5)]
)  # the end of a block of a full disk has room for lines of metrics.jsonl
def test_a_run_that_goes_on_loses_nothing(troubled, kind, failed):
    found = troubled[f"{kind}, continue"]
    assert (found["code"], found["step"]) == (0, 8)
    assert found["names"] == [*FINISHED, "validation.safetensors"]
    assert found["rows"] == troubled["untroubled"]["rows"]
    counts = [int(re.fullmatch(rf"not saved: .*{GOES_ON}", line)[1]) for line in lines_of(found)]
    assert counts == list(range(1, failed + 1))


def test_what_fails_in_the_background_is_said_at_the_next_save(troubled):
    found = troubled["full, in the background"]
    assert (found["code"], found["step"]) == (0, 8)
    assert all(re.fullmatch(rf"not saved: .*{NO_SPACE}{GOES_ON}", line) for line in lines_of(found))
    assert 1 <= len(lines_of(found)) <= 2  # that of step 4 was perhaps written before the disk was full


def test_the_last_save_is_an_error_in_any_case(troubled):
    found = troubled["full at the end"]
    assert (found["code"], found["step"]) == (1, 4)
    *before, last = lines_of(found)
    assert len(before) == 1
    assert re.match(rf"error: step 8 of 8: .*{NO_SPACE}\. The checkpoint of step 4 is whole\. ", last)
    assert [step for step, _ in found["rows"]] == list(range(1, 9))
    found = troubled["read-only for the report"]
    assert (found["code"], found["step"]) == (1, 8)
    (line,) = lines_of(found)
    assert re.match(
        r"error: step 8 of 8: \[Errno 30\] Read-only file system: '.*report.png.*'\. The checkpoint of", line
    )


def test_a_cache_that_cannot_be_filled_leaves_nothing(troubled):
    found = troubled["cache"]
    assert (found["code"], found["out"], found["left"]) == (2, False, [])
    (line,) = lines_of(found)
    assert "No space left on device" in line


def test_a_run_goes_on_to_the_same_end(tmp_path, monkeypatch, capsys):
    """Where no file system can be had: errors of the library, at two of four saves."""
    assert main(arguments(tmp_path, "--out", str(tmp_path / "whole"))) == 0
    write, calls = safetensors.torch.save_file, iter(range(100))

    def failing(tensors, path, metadata):
        if next(calls) in (3, 5):  # a file of step 4, which ends that save, and one of step 6
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", failing)
    options = ("--save-every", "2", "--on-save-error", "continue")
    capsys.readouterr()
    assert main(arguments(tmp_path, "--out", str(tmp_path / "run"), *options)) == 0
    printed = capsys.readouterr()
    assert len(re.findall(f"not saved: .*{GOES_ON}\n", printed.err)) == 2
    assert printed.out.endswith("not saved 2 times on the way; at the end everything was\n")
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoint.*"))


def test_a_row_that_could_not_be_written_is_there_before_the_next_checkpoint(tmp_path, monkeypatch):
    flush, calls, save, rows = MetricsLog.flush, iter(range(100)), trainer.save, []

    def failing(log):
        if next(calls) == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(log)

    run = tmp_path / "run"
    monkeypatch.setattr(MetricsLog, "flush", failing)
    monkeypatch.setattr(
        trainer, "save", lambda each: rows.append(len(read_metrics(run / "metrics.jsonl"))) or save(each)
    )
    options = ("--log-every", "4", "--save-every", "3", "--on-save-error", "continue")
    assert main(arguments(tmp_path, "--out", str(run), *options)) == 0
    assert rows == [1, 2, 3]  # of step 1, 4 and 8, at the checkpoints of 3, 6 and 8


def failing_once(method: str, step: int) -> Callable[[int], None]:
    """What a rank does first: have the log's method fail in the first one, when ``step`` rows are written. No other
    reads the checkpoint for what it would say."""

    def before(rank: int) -> None:
        checkpoint.step_of = checkpoint.step_of if rank == 0 else None
        write, calls = getattr(MetricsLog, method), iter(range(100))

        def failing(log, *arguments, **options):
            assert rank == 0
            if next(calls) == step:
                raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")
            write(log, *arguments, **options)

        setattr(MetricsLog, method, failing)

    return before


@pytest.mark.parametrize(("method", "step"), [("append", 3), ("__init__", 0)])
def test_all_processes_stop_for_the_cause_that_one_of_them_met(tmp_path, method, step):
    log, argv = tmp_path / "log", arguments(tmp_path, "--out", str(tmp_path / "run"), "--save-every", "2")
    assert ended(start(argv, 2, log, failing_once(method, step)), log.read_text) == [1, 1]
    (line,) = [line for line in log.read_text().splitlines() if re.search("error|warning", line, re.IGNORECASE)]
    cause = r"\[Errno 28\] No space left on device: 'metrics.jsonl'\."
    assert re.match(rf"error: step {step and step + 1} of 8: {cause} ", line), line


def test_processes_go_on_when_one_of_them_could_not_write(tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    options = ("--save-every", "3", "--async-save", "--on-save-error", "continue", "--eval-tokens", "16")
    finish(start(arguments(tmp_path, "--out", str(run), *options), 2, log, failing_once("flush", 3)), log)
    assert re.findall(f"not saved: .*{GOES_ON}\n", log.read_text()) == ["1"]
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == list(range(1, 9))


def test_a_second_signal_to_one_process_in_a_save_stops_all_at_once(tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"

    def before(rank: int) -> None:
        def write(*arguments):
            raise Interrupted(signal.SIGINT)

        if rank == 1:
            checkpoint_writer.Writer.write_data = write

    argv = arguments(tmp_path, "--out", str(run), "--save-every", "2")
    assert ended(start(argv, 2, log, before), log.read_text) == [130, 130], log.read_text()
    assert log.read_text().endswith(
        f"\nstopped at once. That was before the first checkpoint: {run} cannot be continued.\n"
    )


def test_what_fails_in_the_background_of_the_last_save_is_an_error():
    class Failing:
        def wait(self):
            raise OSError(errno.ENOSPC, "No space left on device", "checkpoint.new")

    with pytest.raises(OSError, match=r"checkpoint\.new"):
        Saves("continue").take_last(Failing)


@pytest.mark.parametrize(("n_processes", "patience"), [(1, None), (2, 30.0)])
def test_a_run_that_fails_waits_for_what_is_being_written(n_processes, patience, monkeypatch):
    """As when the loss is not finite: the message names the last checkpoint."""

    class Slow:
        settled = 0.0

        def settle(self, seconds):
            self.settled = seconds

    monkeypatch.setattr(processes, "world_size", lambda: n_processes)
    slow, saves = Slow(), Saves("stop")
    saves.take(lambda: slow)
    with pytest.raises(RuntimeError), saves:
        raise RuntimeError
    assert slow.settled == patience


def test_a_run_that_saves_in_the_background_is_continued(tmp_path):
    run = tmp_path / "run"
    assert main(arguments(tmp_path, "--out", str(tmp_path / "whole"))) == 0
    assert main(arguments(tmp_path, "--out", str(run), "--steps", "5", "--save-every", "1", "--async-save")) == 0
    assert step_of(run) == 5
    assert main(["--resume", str(run), "--steps", "8"]) == 0
    assert_same_run(tmp_path / "whole", run)
