"""Several processes train as one does: the same losses, one report, one message; and go on when one of them ends.

The ranks are CPU processes over gloo. A float32 sum over rows that is taken in another order differs in its last bits:
losses and norms agree to a part in 10^5.
"""

import contextlib
import io
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from forked_runs import finish, fork, free_port
from ranks import run_ranks
from tiny_decoder import V, model
from tiny_run import MODEL, arguments
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from looped.kernels import device
from looped.model import LoopedLM
from looped.sharding import replicate, share_out, whole
from train import checkpoint, processes, trainer
from train.bad_steps import NOWHERE, locate
from train.metrics import read_metrics
from train.run import main
from train.step import training_step

pytestmark = pytest.mark.usefixtures("no_picture")
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
    """What the ranks of torchrun are told; and their output."""
    os.environ["RANK"] = str(rank)
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
    rules = {
        "--batch-size 5": "batch_size must be divisible by processes x grad_accumulation. Got 2 processes",
        "--d-ff 16777216 --d-model 16777216": "the model must fit in memory",
    }
    for words, rule in rules.items():
        with as_rank(rank) as (_, errors):
            assert main([*options(directory, "fused", 2), *words.split(), "--out", str(directory / "bad")]) == 2
        assert errors.getvalue().startswith(f"error: {rule}") if rank == 0 else not errors.getvalue()
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
        for faster in (True, False):  # a CPU with, and without, fast products of bfloat16
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(device, "multiplies_faster", lambda dtype, faster=faster: faster)
                check_exchanges(model(**which), rows)
    torch.save(results, Path(folder, f"{rank}.pt"))


class Exchanges(TorchDispatchMode):
    """How often weights are gathered while it is on, and the dtypes in which gradients are summed."""

    def __init__(self) -> None:
        super().__init__()
        self.gathers, self.summed = 0, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.gathers += "allgather" in str(func)
        if "reduce_scatter" in str(func):
            self.summed |= {tensor.dtype for tensor in tree_leaves(args) if isinstance(tensor, torch.Tensor)}
        return func(*args, **(kwargs or {}))


def check_exchanges(network: LoopedLM, rows: list[torch.Tensor]) -> None:
    """A step gathers each block once, and all else once, whatever K; gradients are averaged in float32."""
    share_out(network, dist.group.WORLD, torch.bfloat16)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, fused=True)
    with Exchanges() as exchanges:
        training_step(network, optimizer, *rows, supervision="per-loop", penalty=0.0, dtype=torch.bfloat16, n_loops=3)
    assert exchanges.gathers == len(network.blocks) + 1
    assert exchanges.summed == {torch.float32}


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


def mortal(argv: list[str]) -> None:
    """A process of torchrun's. Its second ends with the first step after the checkpoint of step 4, once.

    It takes as long to find the checkpoint whole as that of a large model does: torchrun's SIGTERM comes meanwhile.
    """
    take_step, step_of = trainer._step, checkpoint.step_of

    def slow(out: Path) -> int | None:
        time.sleep(1)
        return step_of(out)

    def step(run: Any, measure: bool) -> Any:
        if processes.rank() == 1 and run.step == 5 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return take_step(run, measure)

    trainer._step, checkpoint.step_of = step, slow
    code = main(argv)
    if code:  # torchrun waits for a result of forks
        processes.end(lambda: code)


def torchrun(words: list[str], argv: list[str]) -> None:
    """As the program of that name, but its processes are forks, which have PyTorch loaded."""
    os.setpgid(0, 0)  # whoever kills it kills its processes too
    launch = config_from_args(parse_args([*words, "forks"]))[0]
    launch.start_method = "fork"
    elastic_launch(launch, mortal)(argv)


def mortal_options(directory: Path) -> list[str]:
    return arguments(directory, "--save-every", "2", "--eval-tokens", "16")


def test_killed_processes_go_on_from_the_last_checkpoint(runs: Path, tmp_path: Path) -> None:
    """With dropout, whose numbers are each process's own: the losses are those of a run that nobody killed."""
    killed, log = tmp_path / "killed", tmp_path / "log"
    words = ["--nproc-per-node", "2", "--master-port", free_port(), "--max-restarts", "1"]
    argv = [*mortal_options(runs), "--out", str(killed)]
    finish([fork(lambda: torchrun(words, argv), log)], log)
    said = log.read_text().splitlines()
    (error,) = (line for line in said if line.startswith("error:"))
    assert error.startswith("error: step 5 of 8: process 0 of 2 stops: another process has ended or does not ")
    assert "The checkpoint of step 4 is whole. To continue from it: torchrun --nproc-per-node 2 " in error
    rows = [read_metrics(run / "metrics.jsonl") for run in (runs / "whole", killed)]
    assert len(rows[0]) == len(rows[1]) == 8
    for expected, row in zip(*rows, strict=True):
        for key in ("step", "loss", "ce", "grad_norm", "state_norm"):
            assert row[key] == expected[key]
    assert f"into      {killed}, from step 4" in said
    assert not (killed / processes.LAUNCH).exists()
