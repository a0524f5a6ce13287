"""What one process makes of what torchrun tells it: restarts, shares, numbers of its own, refusals."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import arguments

from looped.graph import eagerly
from train import processes
from train.config import device_of, preset_config
from train.prepare import launcher
from train.run import configured, main


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


def test_a_run_that_is_not_started_again_has_no_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for restarts in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
        processes.note_launch(tmp_path)
        assert (tmp_path / processes.LAUNCH).exists() == (restarts == "1")


@pytest.mark.usefixtures("restarted")
def test_restarts_need_a_name_to_find_the_run_by(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"out must be given with torchrun --max-restarts"):
        configured(arguments(tmp_path))


def test_one_process_is_all_of_them() -> None:
    x = torch.arange(6.0)
    assert processes.total(x) is x
    assert (processes.rank(), processes.world_size(), processes.is_first()) == (0, 1, True)
    assert processes.gather("a") == ["a"]
    assert processes.largest(3) == 3
    assert processes.why_lost(RuntimeError("Connection closed by peer")) is None
    state = torch.get_rng_state()
    processes.seed_step(1, 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_error_that_cannot_be_sent_is_told_in_words() -> None:
    class Local(OSError): ...

    assert str(processes._plain(Local(28, "No space left"))) == "Local: [Errno 28] No space left"
    known = OSError(28, "No space left")
    assert processes._plain(known) is known


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


@pytest.mark.parametrize(("rank", "size"), [(None, "2"), ("first", "2"), ("0", "two")])
def test_processes_that_cannot_meet_say_so(
    rank: str | None, size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert main(arguments(tmp_path, "--out", str(tmp_path / "run"))) == 2
    error = f"error: the processes must be able to meet as torchrun says. Got RANK={rank}, WORLD_SIZE={size},"
    assert capsys.readouterr().err.startswith(error)
    assert not (tmp_path / "run").exists()


def test_a_rank_that_the_environment_names_silences_no_single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    assert not processes.is_later()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert processes.is_later()


def test_several_processes_capture_no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    assert launcher(preset_config("demo"), torch.device("cuda")) is eagerly


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
