import sys
import warnings
from dataclasses import replace

import pytest
import torch
from forked_runs import ended, start
from hostile import contents
from readout_case import Case
from tiny_run import arguments

from looped.kernels import VocabularyShard, looped_cross_entropy, out_of_memory, readout
from looped.kernels.out_of_memory import is_out_of_memory
from train import prepare, processes, trainer
from train.config import preset_config
from train.out_of_memory import out_of_memory as advised
from train.run import main

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...\nmore lines")


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    """None has run out, in this test."""
    monkeypatch.setattr(out_of_memory, "_halved", {})


@pytest.fixture
def rows_at_once(monkeypatch):
    """The rows of every attempt. One of more than `room` fails as late as it can: all is written by then."""
    read_out, seen = readout._read_out, []

    def limited(*given):
        call = given[-1]
        assert sys.exc_info()[0] is None  # an error being handled keeps the memory of the attempt that it ended
        seen.append(call.chunk_rows)
        read_out(*given)
        if call.chunk_rows > limited.room:
            raise FULL

    limited.room = 8
    limited.seen = seen
    monkeypatch.setattr(readout, "_read_out", limited)
    return limited


def case() -> Case:
    return Case((3, 10, 16, 40), readout="layernorm", weights="token", penalty=0.1, ignored=2)


def test_the_chunk_is_halved_once_and_said(rows_at_once):
    rows_at_once.room = 100
    expected, _ = case().run(looped_cross_entropy, chunk_rows=7)
    rows_at_once.room = 8
    rows_at_once.seen.clear()
    with pytest.warns(RuntimeWarning, match="memory of cpu ran out in the readout, with 14 rows .* it takes 7 "):
        actual, _ = case().run(looped_cross_entropy, chunk_rows=14)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, _ = case().run(looped_cross_entropy, chunk_rows=14)
        smaller, _ = case().run(looped_cross_entropy, chunk_rows=3)
    assert rows_at_once.seen == [14, 7, 7, 3]
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
        assert torch.equal(again[name], value), name
        torch.testing.assert_close(smaller[name], value)


def test_a_chunk_of_all_rows_is_halved_as_they_are(rows_at_once):
    rows_at_once.room = 15
    with pytest.warns(RuntimeWarning, match="with 30 rows .* it takes 15 "):
        case().run(looped_cross_entropy)
    assert rows_at_once.seen[1:] == [15]


def test_a_second_time_is_an_error(rows_at_once):
    rows_at_once.room = 2
    with pytest.warns(RuntimeWarning, match="it takes 7 "), pytest.raises(torch.OutOfMemoryError):
        case().run(looped_cross_entropy, chunk_rows=14)
    with pytest.raises(torch.OutOfMemoryError):
        case().run(looped_cross_entropy, chunk_rows=14)
    assert rows_at_once.seen == [14, 7, 7]


def test_another_error_is_not_caught(monkeypatch):
    def fail(*given):
        raise RuntimeError("something else")

    monkeypatch.setattr(readout, "_read_out", fail)
    with pytest.raises(RuntimeError, match="something else"):
        case().run(looped_cross_entropy, chunk_rows=14)


def test_nothing_is_repeated_in_a_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    call = readout.ReadoutCall("raw", 1e-6, 1, (0,), chunk_rows=64)
    with pytest.raises(torch.OutOfMemoryError):
        out_of_memory.halve(FULL, call, torch.device("cuda", 0), n_rows=64)


def test_the_ranks_of_a_group_keep_the_same_chunks():
    device, shard = torch.device("cpu"), VocabularyShard(100, group="", rank=0, n_ranks=2)
    alone = readout.ReadoutCall("raw", 1e-6, 1, (0,), chunk_rows=64)
    shared = alone._replace(shard=shard)
    with pytest.raises(torch.OutOfMemoryError):
        out_of_memory.halve(FULL, shared, device, n_rows=64)
    with pytest.warns(RuntimeWarning, match="it takes 32 from here on"):
        out_of_memory.halve(FULL, alone, device, n_rows=64)
    assert out_of_memory.within_memory(alone, device).chunk_rows == 32
    assert out_of_memory.within_memory(shared, device) == shared


def test_the_hosts_memory_too():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(FULL)
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    assert not is_out_of_memory(MemoryError())


@pytest.mark.parametrize(
    ("options", "advice", "command"),
    [
        ((), "Take --grad-accumulation 2, or --checkpoint-loops or a new", "--grad-accumulation 2"),
        (("--grad-accumulation", "2"), "Take --grad-accumulation 4, or", "--grad-accumulation 4"),
        (("--grad-accumulation", "4"), "Take --checkpoint-loops or a new", "--checkpoint-loops"),
        (("--grad-accumulation", "4", "--checkpoint-loops"), "begin a run with a smaller --seq-len", ""),
    ],
)
def test_a_run_says_what_helps(options, advice, command, tmp_path, monkeypatch, capsys):
    take_step = trainer.training_step

    def step(*given, **named):
        if len(calls) == 4:
            raise FULL
        calls.append(1)
        return take_step(*given, **named)

    calls = []
    monkeypatch.setattr(trainer, "training_step", step)
    run = tmp_path / "run"
    assert main(arguments(tmp_path, "--out", str(run), "--save-every", "2", *options)) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        "error: step 4 of 8: memory ran out (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 "
    )
    assert error.count("\n") == 1
    assert advice in error
    assert error.rstrip().endswith(f"--resume {run} {command}".rstrip())
    monkeypatch.undo()
    assert main(["--resume", str(run), *command.split()]) == 0


def test_a_model_that_is_too_large_is_one_line(tmp_path, monkeypatch, capsys):
    def fail(*given, **named):
        raise FULL

    monkeypatch.setattr(prepare, "_optimizer", fail)
    assert main(arguments(tmp_path, "--out", str(tmp_path / "run"))) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: memory ran out (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 ")
    assert line.endswith("). Lower --d-model, --d-ff, --n-layers or --vocab-size.")
    assert not (tmp_path / "run").exists()


def test_what_one_process_has_no_memory_for_leaves_the_directory_as_it_was(tmp_path):
    run, log, argv = tmp_path / "run", tmp_path / "log", arguments(tmp_path, "--eval-tokens", "16")

    def before(rank: int) -> None:
        def fail(*given, **named):
            raise FULL

        if rank == 1:
            prepare._optimizer = fail

    assert ended(start([*argv, "--out", str(run)], 2, log, before), log.read_text) == [1, 1]
    assert "error: memory ran out" in log.read_text()
    assert not run.exists()
    assert main([*argv, "--out", str(run), "--steps", "1"]) == 0
    finished = contents(run)
    assert ended(start(["--resume", str(run), "--steps", "2"], 2, log, before), log.read_text) == [1, 1]
    assert contents(run) == finished


@pytest.mark.parametrize(("n_processes", "command"), [(2, ("--grad-accumulation", "3")), (6, ("--checkpoint-loops",))])
def test_what_helps_divides_the_batch_of_several_processes(n_processes, command, monkeypatch):
    monkeypatch.setattr(processes, "world_size", lambda: n_processes)
    _, *options = advised(FULL, replace(preset_config("demo"), batch_size=6))
    assert tuple(options) == command


def test_a_run_whose_readout_is_halved_goes_on(tmp_path, rows_at_once):
    """One warning; the loss is that of smaller chunks."""
    rows_at_once.room = 100
    run = tmp_path / "run"
    with pytest.warns(RuntimeWarning, match="with 192 rows .* it takes 96 ") as warned:
        assert main(arguments(tmp_path, "--out", str(run))) == 0
    assert len([w for w in warned if "rows of logits" in str(w.message)]) == 1
    assert rows_at_once.seen[:9] == [512] + 8 * [96]
    assert set(rows_at_once.seen[9:]) == {96}  # of the evaluation


def test_another_error_of_a_step_is_not_one_line(tmp_path, monkeypatch):
    def fail(*given, **named):
        raise RuntimeError("something else")

    monkeypatch.setattr(trainer, "training_step", fail)
    with pytest.raises(RuntimeError, match="something else"):
        main(arguments(tmp_path, "--out", str(tmp_path / "run")))
