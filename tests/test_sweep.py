import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import get_args

import matplotlib.pyplot as plt
import pytest
import torch
from forked_runs import ended, forked
from hostile import contents
from safetensors.torch import load_file
from tiny_sweep import NAMES, PROGRAM, assert_rejected, finished_sweep, main_of_forks, sweep_words, tasks_of

from looped.command_line import command_line
from train.config import TrainConfig
from train.metrics import read_metrics
from train.paper import judging, sweep
from train.paper.__main__ import main
from train.paper.conditions import CONDITIONS, Condition
from train.paper.options import split_words
from train.paper.plan import SweepConfig, Task, plan, sweep_command
from train.paper.runs import EXECUTION
from train.run import main as train_main
from train.run import parse

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return finished_sweep(tmp_path_factory)


@pytest.fixture
def directory(finished, tmp_path) -> Path:
    """A copy of the finished sweep, to be damaged. Its text and cache stay where they are, so that configurations
    fit."""
    shutil.copytree(finished / "sweep", tmp_path / "sweep")
    return tmp_path


def again(finished, directory: Path, *options: str, extra: tuple[str, ...] = ()) -> list[str]:
    return sweep_words(finished, "--out", str(directory / "sweep"), *options, extra=extra)


def test_every_condition_is_a_distinct_set_of_fields():
    assert list(CONDITIONS) == list(get_args(Condition))
    fields = [tuple(values.items()) for values in CONDITIONS.values()]
    assert len(set(fields)) == len(fields) == 9
    names = {field for values in CONDITIONS.values() for field in values}
    assert names <= set(TrainConfig.__dataclass_fields__)


def test_runs_are_what_their_directories_say(finished):
    for condition in NAMES:
        run = finished / "sweep" / condition / "seed-7"
        config = json.loads((run / "config.json").read_text())["train"]
        assert {name: config[name] for name in CONDITIONS[condition]} == CONDITIONS[condition]
        assert (config["seed"], config["steps"], config["d_model"]) == (7, 8, 32)
        assert read_metrics(run / "metrics.jsonl")[-1]["step"] == 8
        assert "step 8/8" in run.with_name("seed-7.log").read_text()


def test_one_line_a_run(finished):
    lines = (finished / "printed.txt").read_text().splitlines()
    assert lines[0].endswith("0 done, 2 to train")
    for line, condition, done in zip(lines[1:3], NAMES, ("1 of 2", "2 of 2"), strict=True):
        last = read_evaluation(finished / "sweep" / condition / "seed-7")[-1]
        assert line.startswith(f"{condition} ")
        assert f"PPL {last['ppl']:.4g} " in line
        assert f"||H_4|| {last['state_norm']:.4g} " in line
        assert f"{done} done" in line
    assert len(lines) == 4


def test_report(finished):
    out = finished / "sweep"
    record, page = json.loads((out / "sweep.json").read_text()), (out / "sweep.md").read_text()
    assert [run["condition"] for run in record["runs"]] == list(NAMES)
    for statistics in record["conditions"]:
        first, *_, last = read_evaluation(out / statistics["condition"] / "seed-7")
        gap = first["ce"] - last["ce"]
        assert statistics["complete"] == 1
        assert statistics["ppl"]["mean"] == last["ppl"]
        assert statistics["exit_gap"]["mean"] == pytest.approx(gap)
        line = next(line for line in page.splitlines() if line.startswith(f"| `{statistics['condition']}` | 1 |"))
        for value in (f"{last['ppl']:.4g}", f"{last['state_norm']:,.4g}", f"{gap:+.4f}"):
            assert f"| {value} |" in line
    assert "--preset paper-129m" in page
    command = ["python", "-m", "train.paper", *sweep_words(finished)]
    assert record["command"] == command
    assert f"\n{shlex.join(command)}\n" in page
    assert sweep_command(out) == [shlex.join(command)]
    assert plt.imread(out / "exit_gap.png").shape[1] > 900


def read_evaluation(run: Path) -> list[dict]:
    return json.loads((run / "summary.json").read_text())["evaluation"]


def test_complete_runs_are_skipped(finished, directory, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "_start", None)
    before = contents(directory / "sweep" / NAMES[1])
    assert main(again(finished, directory)) == 0
    assert "2 done, 0 to train" in capsys.readouterr().out
    assert contents(directory / "sweep" / NAMES[1]) == before


@pytest.mark.parametrize(
    ("options", "extra", "message"),
    [
        (["--steps", "9"], (), "steps must be that of the runs .* Got steps=9; .*seed-7 has 8"),
        ([], ("--learning-rate", "0.1"), "learning_rate must be that"),
        ([], ("--eval-tokens", "64"), "eval_tokens must be that"),
        (["--seeds", "8"], ("--d-model", "64"), "d_model must be that"),  # not asked for, but in the same table
    ],
)
def test_other_settings_in_the_same_directory(finished, directory, capsys, options, extra, message):
    assert_rejected(again(finished, directory, *options, extra=extra), message, capsys, directory)


def test_run_that_is_not_what_its_directory_says(finished, directory, capsys):
    config = directory / "sweep" / NAMES[1] / "seed-7" / "config.json"
    config.write_text(config.read_text().replace('"penalty": 0.0', '"penalty": 0.5'))
    message = r"penalty must be that .* Got penalty=0.0; .*per-loop-rmsnorm/seed-7 has 0.5"
    assert_rejected(again(finished, directory), message, capsys, directory)
    report_only = ["sweep", "--out", str(directory / "sweep"), "--report-only"]
    assert_rejected(report_only, "penalty must be that", capsys, directory)
    config.write_text("{")
    for name in ("complete", "diverged"):
        if name == "diverged":
            config.with_name("summary.json").rename(config.with_name("diverged.json"))
        message = rf"^error: {config} cannot be used: remove {config.parent}\. "
        assert_rejected(again(finished, directory), message, capsys, directory)
        assert_rejected(report_only, message, capsys, directory)
        claims = ["claims", "--runs", str(directory / "sweep"), "--out", str(directory / "page"), "--seeds", "7"]
        assert_rejected(claims, message, capsys, directory)


@pytest.mark.parametrize(
    ("options", "extra", "message"),
    [
        (["--conditions", "per-loop-batchnorm"], (), "'per-loop-batchnorm' for argument '--conditions'"),
        (["--conditions", "per-loop-raw", "per-loop-raw"], (), "conditions must be .* only once"),
        (["--seeds", "1", "1"], (), "seeds must be .* only once. Got 1 1"),
        (["--jobs", "0"], (), "jobs must be at least 1. Got jobs=0"),
        (["--steps", "0"], (), "steps must be at least 1"),
        (["--epochs", "1"], (), "steps or epochs, not both"),
        (["--preset", "ouro-1.4b"], (), "'ouro-1.4b' for argument '--preset'"),
        (["--data", "no.txt"], (), "no.txt"),
        ([], ("--vocab-size", "50000"), "vocab_size must be at most"),  # only the text can tell
        ([], ("--d-model", "33"), "d_model must be divisible by n_heads"),
        ([], ("--seed", "3"), "--seed is the sweep's own option"),
        ([], ("--no-inter_loop_norm",), "--no-inter_loop_norm is the sweep's own option"),
        ([], ("--readout=raw",), "--readout=raw is the sweep's own option"),
        (["--jobs", "2"], ("--device", "cuda:0"), "device must be auto, cpu or cuda with several jobs"),
    ],
)
def test_bad_options(tmp_path, capsys, monkeypatch, options, extra, message):
    """Found before there is a directory, so before it is locked."""
    monkeypatch.setattr(sweep, "_start", None)
    if "cuda:0" in extra:  # as where there is one
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert_rejected(sweep_words(tmp_path, *options, extra=extra), message, capsys, tmp_path)


def test_a_sweep_that_did_not_keep_its_command_has_one_that_trains_the_same(finished, directory):
    out = directory / "sweep"
    record = json.loads((out / "sweep.json").read_text())
    del record["command"]
    (out / "sweep.json").write_text(json.dumps(record))
    note, command = sweep_command(out)
    assert note.startswith("# the command was not kept")
    assert command.startswith("python -m train.paper sweep ")
    own, extra = split_words(shlex.split(command)[4:])
    derived = {task.run.condition: task.config for task in plan(command_line(own, SweepConfig()), extra)}
    for task in tasks_of(sweep_words(finished)):
        carried_out = {name: getattr(task.config, name) for name in EXECUTION} | {"seed": 7}
        assert dataclasses.replace(derived[task.run.condition], **carried_out) == task.config
    assert sweep_command(directory / "nowhere") == []


def test_claims_are_judged_after_training(finished, directory):
    page = directory / "page"
    argv = again(finished, directory, "--claims", str(page))
    called = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging, "run", lambda words: called.append(words) or 0)
        assert main(argv) == 0
        out = str(directory / "sweep")
        assert main(["sweep", "--out", out, "--report-only", "--claims", str(page), "--seeds", "7"]) == 0
    assert called == [["--runs", out, "--out", str(page), "--jobs", "1", "--seeds", "7"]] * 2


def test_report_only(directory, capsys):
    out = directory / "sweep"
    names = ("sweep.json", "sweep.md", "exit_gap.png")
    before = [(out / name).read_bytes() for name in names[:2]]
    for name in names[1:]:  # the first one has the command
        (out / name).unlink()
    assert main(["sweep", "--out", str(out), "--report-only"]) == 0
    assert [(out / name).read_bytes() for name in names[:2]] == before
    assert (out / "exit_gap.png").exists()
    empty = ["sweep", "--out", str(directory / "empty"), "--report-only"]
    assert_rejected(empty, "out must hold the runs", capsys, directory)


def stop_half_way(task: Task) -> None:
    """Replace a finished run by the same one, stopped after half of its steps."""
    shutil.rmtree(task.run.directory)
    assert train_main([*task.options, "--steps", "4", "--out", str(task.run.directory)]) == 0
    (task.run.directory / "summary.json").unlink()
    config = task.run.directory / "config.json"
    config.write_text(config.read_text().replace('"steps": 4', '"steps": 8'))


def test_stopped_runs_are_continued_or_begun_again(finished, directory, capsys):
    argv = again(finished, directory, "--jobs", "2")
    stopped, unfinished = tasks_of(argv)
    stop_half_way(stopped)
    shutil.rmtree(unfinished.run.directory / "checkpoint")
    (unfinished.run.directory / "summary.json").unlink()
    (unfinished.run.directory / "report.png").unlink()
    (unfinished.run.directory / "metrics.jsonl").write_text('{"step": 1, "loss"')  # killed while it wrote
    capsys.readouterr()
    assert main_of_forks(argv) == 0
    printed = capsys.readouterr().out
    assert re.search(r"terminal-rmsnorm +seed 7 +is continued", printed)
    assert re.search(r"per-loop-rmsnorm +seed 7 +had no checkpoint yet: removed", printed)
    for task in (stopped, unfinished):
        whole = finished / "sweep" / task.run.condition / "seed-7"
        weights = [load_file(run / "checkpoint" / "model.safetensors") for run in (whole, task.run.directory)]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        assert [row["step"] for row in read_metrics(task.run.directory / "metrics.jsonl")] == list(range(1, 9))
    assert "from step 4" in stopped.run.log.read_text()


def test_what_would_fail_after_training_is_found_before(finished, directory, capsys, monkeypatch):
    """Nothing is trained, and nothing but a run is removed."""
    monkeypatch.setattr(sweep, "_start", None)
    shutil.rmtree(directory / "sweep" / NAMES[0] / "seed-7")
    unknown = directory / "sweep" / NAMES[1] / "seed-7"
    shutil.rmtree(unknown)
    unknown.mkdir()
    (unknown / "metrics.jsonl.new").write_text("")  # as a run leaves that was killed
    (unknown / "thesis.tex").write_text("x")
    message = "out must hold nothing but runs. .*seed-7 holds thesis.tex"
    assert_rejected(again(finished, directory), message, capsys, directory)
    page = str(directory / "page")
    argv = sweep_words(finished, "--claims", page, "--out", str(directory / "x"), extra=("--n-loops", "3"))
    message = "n_loops must be 4, the paper's, for --claims. Got n_loops=3"
    assert_rejected(argv, message, capsys, directory)
    message = "out must be a directory that can be written. Got out=/proc/page"
    assert_rejected(again(finished, directory, "--claims", "/proc/page"), message, capsys, directory)


@pytest.mark.parametrize(("rate", "limit"), [("1e30", "5"), ("1e39", "9")])
def test_divergence_is_a_result(tmp_path, capsys, rate, limit):
    """Of the loss, in steps in a row; or of a weight, at the last of 8 steps, when it is to be saved."""
    extra = ("--learning-rate", rate, "--max-bad-steps", limit, "--warmup-steps", "0")
    argv = sweep_words(tmp_path, "--conditions", "per-loop-raw", extra=extra)
    assert main_of_forks(argv) == 0
    assert re.search(r"per-loop-raw +seed 7 +diverged at step \d", capsys.readouterr().out)
    table = (tmp_path / "sweep" / "sweep.md").read_text()
    assert "| `per-loop-raw` | 0, 1 diverged | - |" in table
    assert re.search(r"Not complete: `per-loop-raw` seed 7 \(diverged at step \d\)", table)
    assert main(argv) == 0  # and is not tried again
    assert "1 done, 0 to train" in capsys.readouterr().out


def test_failure_of_one_run_does_not_end_the_sweep(finished, directory, capsys):
    argv = again(finished, directory)
    torn, missing = tasks_of(argv)
    stop_half_way(torn)
    (torn.run.directory / "checkpoint" / "model.safetensors").write_bytes(b"")
    shutil.rmtree(missing.run.directory)
    capsys.readouterr()
    assert main_of_forks(argv) == 1
    printed = capsys.readouterr().out
    assert re.search(r"terminal-rmsnorm .* failed \(exit 2, see .*seed-7.log\): error: .* is torn", printed)
    assert re.search(r"per-loop-rmsnorm .* PPL .* 2 of 2 done", printed)
    record = json.loads((directory / "sweep" / "sweep.json").read_text())
    assert [run["status"] for run in record["runs"]] == ["checkpoint", "complete"]


def wait_until(holds, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def in_training(words: list[str]) -> bool:
    return all(read_metrics(task.run.directory / "metrics.jsonl") for task in tasks_of(words))


def test_sweep_is_stopped_and_its_directory_is_its_own(tmp_path, capsys, monkeypatch):
    words = sweep_words(tmp_path, "--steps", "100000", "--jobs", "2")

    def swept() -> int:
        os.setpgid(0, 0)  # whoever kills it kills its runs too
        return main_of_forks(words)

    with open(tmp_path / "printed.txt", "wb") as printed:
        process = forked(swept, printed.fileno(), printed.fileno())
    try:
        wait_until(lambda: in_training(words))
        monkeypatch.setattr(sweep, "_start", None)
        argv = sweep_words(tmp_path, "--steps", "100000")
        assert main(argv) == 2
        assert "out must not be in use" in capsys.readouterr().err
    finally:
        os.kill(process, signal.SIGTERM)
        codes = ended([process], (tmp_path / "printed.txt").read_text)
    assert codes == [128 + signal.SIGTERM]
    output = (tmp_path / "printed.txt").read_text()
    assert "stopping 2 running" in output
    command = shlex.split(output.splitlines()[-1])
    assert command[:3] == PROGRAM
    assert command[3:] == words
    for task in tasks_of(argv):
        step = json.loads((task.run.directory / "checkpoint" / "checkpoint.json").read_text())["step"]
        assert 1 <= step < 100_000
        assert f"stopped at step {step} of 100000" in task.run.log.read_text()
        table = (tmp_path / "sweep" / "sweep.md").read_text()
        assert f"`{task.run.condition}` seed 7 (at step {step})" in table


def test_runs_of_a_killed_sweep_keep_its_lock(tmp_path, capsys, monkeypatch):
    """The program, and the run that it starts."""
    words = sweep_words(tmp_path, "--steps", "100000", "--conditions", NAMES[0])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([*PROGRAM, *words], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: in_training(words))
        finally:
            process.kill()
    monkeypatch.setattr(sweep, "_start", None)
    (task,) = tasks_of(words)
    try:
        assert main(words) == 2
        assert "out must not be in use" in capsys.readouterr().err
    finally:
        os.kill(_process_of(task.run.directory), signal.SIGTERM)
    wait_until((task.run.directory / "checkpoint").exists)


def _process_of(run: Path) -> int:
    """The process that was started with ``run`` as its --out."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        words: list[bytes] = []
        with contextlib.suppress(OSError):  # it has ended meanwhile
            words = path.read_bytes().split(b"\0")
        if words[-3:] == [b"--out", str(run).encode(), b""]:
            return int(path.parent.name)
    raise AssertionError(f"no process trains {run}")


def test_jobs_share_the_machine(monkeypatch, tmp_path):
    config = tasks_of(sweep_words(tmp_path))[0].config
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert sweep._share(0, 1, config) == {}
    assert sweep._share(1, 3, config) == {"OMP_NUM_THREADS": "2"}
    assert sweep._share(1, 9, config) == {"OMP_NUM_THREADS": "1"}
    on_gpu = dataclasses.replace(config, device="auto")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [sweep._share(slot, 3, on_gpu)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5")
    assert [sweep._share(slot, 2, on_gpu)["CUDA_VISIBLE_DEVICES"] for slot in range(2)] == ["4", "GPU-5"]


def test_order_and_options(tmp_path):
    tasks = plan(SweepConfig(out=tmp_path, preset="paper-44m", seeds=(1, 2), epochs=0.5), ["--device", "cpu"])
    assert [task.run[:2] for task in tasks] == [(name, seed) for seed in (1, 2) for name in CONDITIONS]
    for task in tasks:
        config = parse(task.options)
        assert dataclasses.replace(config, out=None) == task.config
        assert (config.preset, config.epochs, config.d_model) == ("paper-44m", 0.5, 512)
        for name, value in CONDITIONS[task.run.condition].items():
            assert getattr(config, name) == value


@pytest.mark.parametrize("words", [[], ["swep"], ["--out", "x", "sweep"]])
def test_what_is_no_command(words, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert (
        error == f"error: the command must be sweep, claims or frontier, before its options. Got '{' '.join(words)}'.\n"
    )


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"python -m train.paper {command} " in printed for command in ("sweep", "claims", "frontier"))
