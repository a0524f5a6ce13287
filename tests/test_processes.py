"""Several processes train as one does: the same losses, one report, one message; and go on when one of them ends.

The ranks are CPU processes over gloo. A float32 sum over rows that is taken in another order differs in its last bits:
losses and norms agree to a part in 10^5.
"""

import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny_decoder import V, model
from tiny_run import MODEL, arguments

from looped.graph import eagerly
from looped.model import LoopedLM
from looped.sharding import replicate, share_out, whole
from train import processes, report, trainer
from train.bad_steps import NOWHERE, locate
from train.config import device_of, preset_config
from train.metrics import read_metrics
from train.prepare import launcher
from train.run import configured, main
from train.step import training_step

RELATIVE = 1e-5
RUNS = {  # by name: options of runs that must not depend on the number of processes
    "fused": [],
    "plain": ["--no-fused"],
    "shared-out": ["--shard", "fsdp2", "--tied"],
    "drawn": ["--depth", "uniform:1-3", "--inter-loop-norm", "--grad-accumulation", "2"],
    "gated": ["--supervision", "gated", "--shard", "fsdp2", "--no-fused"],
    "task": ["--shard", "fsdp2", "--supervision", "terminal", "--eval-tokens", "90"],  # 9 sequences
}
STEPS = 3


def options(directory: Path, name: str, n_processes: int) -> list[str]:
    """The command line of a run. One process has nothing to share out."""
    shard = RUNS[name] if n_processes > 1 else [word for word in RUNS[name] if word not in ("--shard", "fsdp2")]
    out = str(directory / f"{name}-{n_processes}")
    length = ["--batch-size", "8", "--steps", str(STEPS), "--dropout", "0"]
    if name == "task":
        data = ["--data", "addition", "--seq-len", "10", "--device", "cpu", "--log-every", "1"]
        return [*data, *MODEL, *length, *shard, "--out", out]
    return arguments(directory, *length, *shard, "--out", out)


@contextlib.contextmanager
def as_rank(rank: int) -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """What the ranks of torchrun are told; and their output, and no picture, which takes the longest."""
    os.environ["RANK"] = str(rank)
    report.draw = lambda *_: None  # type: ignore[assignment]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
        yield out, errors


# Runs ----------------------------------------------------------------------------------------------------------------


def train_all(rank: int, folder: str) -> None:
    """Every run of `RUNS`; with two processes also what becomes of faults."""
    n_processes, directory = dist.get_world_size(), Path(folder)
    with as_rank(rank) as (out, _):
        for name in RUNS:
            assert main(options(directory, name, n_processes)) == 0
    assert (not out.getvalue()) == (rank > 0)
    if n_processes == 2:
        check_signal(rank, directory)
        check_bad_option(rank, directory)
        check_silence(rank, directory)
        assert main([*mortal_options(directory), "--out", str(directory / "whole")]) == 0
        take_steps(rank, folder)


def check_signal(rank: int, directory: Path) -> None:
    """A signal to one process stops both after the same step, with the checkpoint of that."""
    take_step = trainer._step

    def interrupted(run: Any, measure: bool) -> Any:
        if rank == 1 and run.step == 1:
            signal.raise_signal(signal.SIGTERM)
        return take_step(run, measure)

    trainer._step = interrupted
    with as_rank(rank) as (out, _):
        assert main([*options(directory, "fused", 2), "--out", str(directory / "stopped")]) == 128 + signal.SIGTERM
    trainer._step = take_step
    assert ("stopped at step 2 of 3" in out.getvalue()) == (rank == 0)
    assert json.loads((directory / "stopped" / "checkpoint" / "checkpoint.json").read_text())["step"] == 2


def check_bad_option(rank: int, directory: Path) -> None:
    with as_rank(rank) as (_, errors):
        assert main([*options(directory, "fused", 2), "--batch-size", "5", "--out", str(directory / "bad")]) == 2
    rule = "error: batch_size must be divisible by processes x grad_accumulation. Got 2 processes, batch_size=5"
    assert errors.getvalue().startswith(rule) if rank == 0 else not errors.getvalue()
    assert not (directory / "bad").exists()


def check_silence(rank: int, directory: Path) -> None:
    """A process that waits for a silent one gives it up, in one line."""
    take_step = trainer._step

    def silent(run: Any, measure: bool) -> Any:
        if rank == 1 and run.step == 1:
            time.sleep(4)
        return take_step(run, measure)

    trainer._step = silent
    limit = ["--collective-timeout", "1", "--save-every", "1", "--out", str(directory / "silent")]
    with as_rank(rank) as (_, errors):
        assert main([*options(directory, "fused", 2), *limit]) == 1
    trainer._step = take_step
    said = errors.getvalue()
    assert said.count("\n") == 1
    assert said.startswith(f"error: step 1 of 3: process {rank} of 2 stops: another process has ended or does not ")
    assert "The checkpoint of step 1 is whole." in said


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with each run by 1, 2 and 4 processes."""
    directory = tmp_path_factory.mktemp("runs")
    for name in RUNS:
        assert main(options(directory, name, 1)) == 0
    for n_processes in (2, 4):
        run_ranks(train_all, directory, str(directory), n_ranks=n_processes)
    return directory


def numbers(value: Any) -> np.ndarray:
    """What JSON has as null is nan."""
    return np.array(value, dtype=np.float64)


@pytest.mark.parametrize("n_processes", [2, 4])
@pytest.mark.parametrize("name", RUNS)
def test_processes_have_the_losses_of_one(runs: Path, name: str, n_processes: int) -> None:
    one, several = (read_metrics(runs / f"{name}-{n}" / "metrics.jsonl") for n in (1, n_processes))
    assert [row["step"] for row in several] == [1, 2, 3]
    for expected, row in zip(one, several, strict=True):
        assert row.keys() == expected.keys()
        for key in ("n_loops", "tokens", "lr", "loss", "ce", "grad_norm", "state_norm", "exit_loop", "exit_entropy"):
            if key in expected:
                assert numbers(row[key]) == pytest.approx(numbers(expected[key]), rel=RELATIVE, nan_ok=True)
        # Where the readout cannot see the scale, the radial gradient is rounding error, of the size of 1e-7.
        radial = [numbers(each["radial_fraction"]) for each in (row, expected)]
        assert radial[0] == pytest.approx(radial[1], rel=0.01, abs=1e-6, nan_ok=True)
    summaries = [json.loads((runs / f"{name}-{n}" / "summary.json").read_text()) for n in (1, n_processes)]
    assert [summary["processes"] for summary in summaries] == [1, n_processes]
    assert len({summary["parameters"] for summary in summaries}) == 1
    for expected, result in zip(*(summary["evaluation"] for summary in summaries), strict=True):
        for key in ("n_loops", "ce", "bits_per_byte", "state_norm"):
            assert numbers(result[key]) == pytest.approx(numbers(expected[key]), rel=RELATIVE, nan_ok=True)
        assert result["accuracy"] == expected["accuracy"]
        if result["n_loops"] <= 3:
            assert result["tokens_per_second"] > 0


# Steps ---------------------------------------------------------------------------------------------------------------

MODELS = [{"fused": True, "tied": True}, {"fused": False, "tied": False}]
WAYS = ("ddp", "fsdp2")
CASES: list[dict[str, Any]] = [{}, {"grad_accumulation": 2}, {"backprop_loops": 1}, {"supervision": "terminal"}]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows for each of two processes. The first has few targets in one row and none in the other."""
    tokens = torch.randint(V, (4, 13), generator=torch.Generator().manual_seed(1))
    targets = tokens[:, 1:].clone()
    targets[0, 2:] = targets[1] = -100
    return tokens[:, :-1], targets


def steps(
    network: LoopedLM, trained: torch.nn.Module, rows: tuple[torch.Tensor, torch.Tensor], case: dict[str, Any]
) -> torch.Tensor:
    """[3, n] what three steps return."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, fused=True)
    how: dict[str, Any] = {"supervision": "per-loop", "penalty": 0.05, "dtype": torch.float32, "measure": True}
    results = []
    for _ in range(3):
        result = training_step(trained, optimizer, *rows, **how | case)
        results.append([*result.loss.view(1), *result.grad_norm.view(1), *result.per_loop, *result.state_norm])
    return torch.tensor(results)


def spread(network: LoopedLM, way: str) -> torch.nn.Module:
    assert dist.group.WORLD is not None
    if way == "fsdp2":
        share_out(network, dist.group.WORLD, torch.float32)
        return network
    return replicate(network, dist.group.WORLD, find_unused=True)


def take_steps(rank: int, folder: str) -> None:
    results = {}
    rows = [tensor.chunk(2)[rank] for tensor in batch()]
    for number, which in enumerate(MODELS):
        for way in WAYS:
            for case_number, case in enumerate(CASES):
                network = model(**which)
                network.checkpoint_loops = case_number == 0
                results[f"{number}-{way}-{case_number}"] = steps(network, spread(network, way), rows, case)
            check_bad_step(rank, model(**which), way, rows)
    torch.save(results, Path(folder, f"{rank}.pt"))


def check_bad_step(rank: int, network: LoopedLM, way: str, rows: list[torch.Tensor]) -> None:
    """A gradient that is nan in one process: the step is left out in all of them, and the place is found."""
    trained = spread(network, way)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, fused=True)
    before = [parameter.detach().clone() for parameter in network.parameters()]

    def break_one(block: Any, given: Any, output: Any) -> Any:
        return tuple(None if x is None else x * torch.nan for x in output) if rank == 1 else output

    hook = network.blocks[1].register_forward_hook(break_one)
    result = training_step(trained, optimizer, *rows, supervision="per-loop", penalty=0.0, dtype=torch.float32)
    assert bool(result.bad)
    with whole(network):
        place = locate(network, *rows, supervision="per-loop", penalty=0.0, dtype=torch.float32, grad_accumulation=1)
    assert place == ("in the forward pass at loop 1, layer 2" if rank == 1 else NOWHERE)
    hook.remove()
    assert all(torch.equal(a, b.detach()) for a, b in zip(before, network.parameters(), strict=True))
    assert not bool(
        training_step(trained, optimizer, *rows, supervision="per-loop", penalty=0.0, dtype=torch.float32).bad
    )


def test_steps_are_those_of_one_process_whatever_targets_are_ignored(runs: Path) -> None:
    results = [torch.load(runs / f"{rank}.pt") for rank in range(2)]
    for number, which in enumerate(MODELS):
        for case_number, case in enumerate(CASES):
            network = model(**which)
            expected = steps(network, network, batch(), case)
            for way in WAYS:
                for result in results:
                    actual = result[f"{number}-{way}-{case_number}"]
                    torch.testing.assert_close(actual, expected, rtol=RELATIVE, atol=0, equal_nan=True)


# One that ends -------------------------------------------------------------------------------------------------------

PROGRAM = """
import os, signal
from train import processes, report, trainer
from train.run import main

report.draw = lambda *_: None
take_step = trainer._step

def mortal(run, measure):
    if processes.rank() == 1 and run.step == 5 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return take_step(run, measure)

trainer._step = mortal
processes.end(main)
"""


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def mortal_options(directory: Path) -> list[str]:
    return arguments(directory, "--save-every", "2", "--eval-tokens", "16")


def test_killed_processes_go_on_from_the_last_checkpoint(runs: Path, tmp_path: Path) -> None:
    """With dropout, whose numbers are each process's own: the losses are those of a run that nobody killed."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    killed = tmp_path / "killed"
    port = ["--master-port", str(29500 + os.getpid() % 20000)]
    started = time.monotonic()
    command = [str(program), *mortal_options(runs), "--out", str(killed)]
    result = torchrun(*port, "--max-restarts", "1", *command)
    assert result.returncode == 0, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert errors[0].startswith("error: step 5 of 8: process 0 of 2 stops: another process has ended or does not ")
    assert "The checkpoint of step 4 is whole. To continue from it: torchrun --nproc-per-node 2 " in errors[0]
    assert time.monotonic() - started < 200
    rows = [read_metrics(run / "metrics.jsonl") for run in (runs / "whole", killed)]
    assert len(rows[0]) == len(rows[1]) == 8
    for expected, row in zip(*rows, strict=True):
        for key in ("step", "loss", "ce", "grad_norm", "state_norm"):
            assert row[key] == expected[key]
    assert f"into      {killed}, from step 4" in result.stdout
    assert not (killed / processes.LAUNCH).exists()


@pytest.fixture
def restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchrun tells a process that it starts again."""
    told = {"RUN_ID": "none", "RESTART_COUNT": "1", "MAX_RESTARTS": "3"}
    for name, value in told.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)


@pytest.mark.usefixtures("restarted")
def test_a_restart_continues_its_own_run_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    command = arguments(tmp_path, "--out", str(run), "--steps", "2", "--eval-tokens", "16")
    assert main(command) == 0
    assert main(command) == 2  # it is complete: whoever began it, this is another run
    assert f"out directory {run} already holds a run" in capsys.readouterr().err
    processes.note_launch(run)
    longer = [*command, "--steps", "3"]
    assert configured(longer).resume == run
    (run / processes.LAUNCH).write_text("torchrun of process 1")
    with pytest.raises(ValueError, match="already holds a run"):
        configured(longer)


@pytest.mark.usefixtures("restarted")
def test_a_restart_before_the_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = arguments(tmp_path, "--out", str(run))
    run.mkdir()
    processes.note_launch(run)
    for name in ("config.json", "metrics.jsonl"):
        (run / name).write_text("{}")
    (run / "checkpoint.new").mkdir()
    assert configured(command).resume is None
    assert list(run.iterdir()) == []


@pytest.mark.usefixtures("restarted")
def test_restarts_need_a_name_to_find_the_run_by(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"out must be given with torchrun --max-restarts"):
        configured(arguments(tmp_path))


# One process ---------------------------------------------------------------------------------------------------------


def test_one_process_is_all_of_them() -> None:
    x = torch.arange(6.0)
    assert processes.total(x) is processes.mean(x) is x
    assert (processes.rank(), processes.world_size(), processes.is_first()) == (0, 1, True)
    assert processes.gather("a") == ["a"]
    assert processes.largest(3) == 3
    assert processes.why_lost(RuntimeError("Connection closed by peer")) is None
    state = torch.get_rng_state()
    processes.seed_step(1, 2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("n_processes", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [1, 2, 9, 64])
def test_shares_are_the_whole_in_as_many_batches_each(
    n: int, n_processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = []
    monkeypatch.setattr(processes, "world_size", lambda: n_processes)
    for rank in range(n_processes):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        shares.append(processes.own_batches(np.arange(n), batch_size=8))
    assert np.array_equal(np.concatenate([each for share in shares for each in share]), np.arange(n))
    assert len({len(share) for share in shares}) == 1


def test_processes_draw_numbers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = []
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    for seed, step, rank in [(1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0), (1, 0, 0)]:
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        processes.seed_step(seed, step)
        draws.append(torch.rand(()).item())
    assert len(set(draws[:4])) == 4
    assert draws[4] == draws[0]


def test_processes_that_cannot_meet_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert main(arguments(tmp_path, "--out", str(tmp_path / "run"))) == 2
    error = "error: the processes must be able to meet as torchrun says. Got RANK=None, WORLD_SIZE=2,"
    assert capsys.readouterr().err.startswith(error)
    assert not (tmp_path / "run").exists()


def test_several_processes_capture_no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    assert launcher(preset_config("demo"), torch.device("cuda")) is eagerly


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shard", "fsdp2"], r"shard needs several processes, which torchrun starts. Got shard=fsdp2 and one"),
        (["--shard", "fsdp2", "--compile"], r"compile must be left out when weights are shared out"),
        (["--collective-timeout", "0"], r"collective_timeout must be finite and above 0. Got collective_timeout=0"),
    ],
)
def test_rejects_options(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configured(arguments(tmp_path, *words))


def test_the_gpu_is_that_of_the_processs_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(processes, "world_size", lambda: 4)
    config = dataclasses.replace(preset_config("demo"), device="auto")
    for local_rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        assert device_of(config) == torch.device("cuda", local_rank)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="device cuda:2 was asked for, and PyTorch sees 2 CUDA devices"):
        device_of(config)
    with pytest.raises(
        ValueError, match=r"device must be auto, cpu or cuda with several processes. Got device='cuda:0'"
    ):
        device_of(dataclasses.replace(config, device="cuda:0"))
