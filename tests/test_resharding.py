"""Checkpoints that several processes wrote: continued by another number, read by one, and damaged."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from forked_runs import ended, finish, rows_of, start, weights_of
from tiny_run import arguments, reseal

from looped.checkpoint import KINDS, CheckpointError, check_whole, files_of, weights_hash
from looped.export import main as export
from looped.run_directory import load_run
from train import checkpoint, gate
from train.checkpoint import step_of
from train.run import main


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("resharding")


def go_on_with_others(directory: Path, shard: str, argv: list[str], log: Path) -> list[list[str]]:
    """A run of 1, 2, 4 and 1 processes, two steps each. What is in its checkpoint after each of them."""
    run, files = directory / shard, []
    for stage, processes in enumerate((1, 2, 4, 1), start=1):
        options = ["--resume", str(run)] if stage > 1 else [*argv, "--out", str(run)]
        options += ["--steps", str(2 * stage), "--shard", shard if processes > 1 else "none"]
        options += ["--save-every", "1", "--async-save" if shard == "fsdp2" else "--no-async-save"]
        finish(start(options, processes, log), log)
        if processes == 4:
            shutil.copytree(run, directory / f"four-{shard}")
        files.append(sorted(path.name for path in (run / "checkpoint").iterdir()))
    return files


@pytest.fixture(scope="module")
def resharded(directory, no_picture) -> dict[str, list[list[str]]]:
    """By how weights were shared out, the files of each checkpoint; and a run that goes on in one process."""
    argv, log = arguments(directory, "--batch-size", "8", "--dropout", "0", "--eval-tokens", "64"), directory / "log"
    finish(start([*argv, "--out", str(directory / "whole")], 1, log), log)
    return {shard: go_on_with_others(directory, shard, argv, log) for shard in ("none", "fsdp2")}


@pytest.fixture
def four(directory, resharded, tmp_path) -> Path:
    """The run that four processes left, to be damaged."""
    return Path(shutil.copytree(directory / "four-fsdp2", tmp_path / "run"))


@pytest.mark.parametrize("shard", ["none", "fsdp2"])
def test_a_run_goes_on_with_another_number_of_processes(directory, resharded, shard):
    """They differ in the order in which a batch is added up."""
    runs = directory / "whole", directory / shard
    expected, losses = ([row["loss"] for row in rows_of(run)] for run in runs)
    assert len(losses) == 8
    assert losses == pytest.approx(expected, rel=1e-6)
    whole, weights = (weights_of(run) for run in runs)
    assert weights.keys() == whole.keys()
    assert max(float((weights[name] - whole[name]).abs().max()) for name in whole) < 1e-6
    parts = [[name for name in names if name.startswith("model")] for names in resharded[shard]]
    assert parts[0] == parts[3] == ["model.safetensors"]
    assert parts[1] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert parts[2] == [f"model-0000{part}-of-00004.safetensors" for part in range(1, 5)]


def test_the_first_process_alone_reads_every_byte(four, tmp_path):
    """Of what all load."""

    def before(rank: int) -> None:
        checkpoint.check_whole = check_whole if rank == 0 else None

    log, argv = tmp_path / "log", ["--resume", str(four), "--steps", "7", "--shard", "none"]
    finish(start(argv, 2, log, before), log)
    (path,) = (four / "checkpoint").glob("rng*")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert ended(start([*argv, "--steps", "8"], 2, log), log.read_text) == [2, 2]
    (line,) = [line for line in log.read_text().splitlines() if "torn" in line]
    assert line == f"error: checkpoint {four}/checkpoint is torn: {path.name} is not what was written."
    shutil.rmtree(four / "checkpoint")
    assert ended(start([*argv, "--steps", "8"], 2, log), log.read_text) == [2, 2]
    (line,) = [line for line in log.read_text().splitlines() if "no checkpoint" in line]
    assert line == f"error: {four} holds no checkpoint."


def test_one_process_reads_what_four_wrote(four):
    model, weights = load_run(four).model, weights_of(four)
    shares = [
        safetensors.torch.load_file(four / "checkpoint" / name) for name in files_of(four / "checkpoint", "model")
    ]
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
        pieces = [share[name] for share in shares if name in share]
        assert torch.equal(value, torch.cat(pieces))  # FSDP2 divides by rows
    assert max(len([1 for share in shares if name in share]) for name in weights) == 4
    assert step_of(four) == 6
    assert load_run(four).weights_hash == weights_hash(four) is not None


def test_the_hash_of_weights_in_parts_is_of_all_of_them(four):
    before, path = weights_hash(four), four / "checkpoint" / "model-00003-of-00004.safetensors"
    change(path, lambda tensors: {name: value + 1 for name, value in tensors.items()})
    assert weights_hash(four) not in (None, before)


def change(path: Path, function) -> None:
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    safetensors.torch.save_file(function(safetensors.torch.load_file(path)), path, metadata)
    reseal(path.parent)


def test_one_file_is_exported(four, tmp_path, capsys):
    assert export([str(four), "--to", "safetensors", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    exported, weights = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors"), weights_of(four)
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], weights[name]) for name in weights)


def test_a_gate_is_trained_on_what_four_wrote(four, tmp_path):
    assert gate.main([str(four), "--out", str(tmp_path / "gated"), "--steps", "1", "--device", "cpu"]) == 0
    assert "exit_gate.weight" in weights_of(tmp_path / "gated")
    assert list(files_of(tmp_path / "gated" / "checkpoint", "model")) == ["model.safetensors"]


class Trap:
    def __reduce__(self):
        return (os.system, ("touch sprung",))


PARTS = [f"{kind}-0000{part}-of-00004.safetensors" for kind in ("model", "optimizer") for part in (1, 4)]


@pytest.mark.parametrize("name", [*PARTS, "checkpoint.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "a pickle"])
def test_torn_parts_are_recognised(four, name, damage, capsys, monkeypatch):
    monkeypatch.chdir(four)
    path = four / "checkpoint" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"cut": content[:-1], "flipped": bytes(content), "a pickle": pickle.dumps(Trap())}
    path.unlink()
    if damage in damaged:
        path.write_bytes(damaged[damage])
    with pytest.raises(CheckpointError, match="is torn"):
        check_whole(four / "checkpoint", KINDS)
    assert step_of(four) is None
    assert main(["--resume", str(four), "--steps", "8", "--shard", "none"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is torn" in line
    if "optimizer" in name:
        load_run(four)  # whoever wants the weights alone does without
    else:
        with pytest.raises(ValueError, match="is torn"):
            load_run(four)
    assert not (four / "sprung").exists()


LIES = {
    "where the first part is": ([0], "do not make up"),
    "before the beginning": ([-5], "do not make up"),
    "beyond all numbers": ([2**70], "cannot be read"),
    "in three dimensions": ([0, 0, 0], "cannot be read|do not make up"),
    "in words": ("there", "cannot be read"),
    "nowhere": (None, "cannot be read"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_about_its_place_is_refused(four, lie):
    path = four / "checkpoint" / "model-00002-of-00004.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    place, message = LIES[lie]
    begins = {}
    for name, at in json.loads(metadata["DCP_SHARDING_INFO"]).items():
        rest = at["saved_offsets"][1:] if place and len(place) == 1 else []
        begins[name] = {"saved_offsets": [*place, *rest] if isinstance(place, list) else place}
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors, path, metadata | {"DCP_SHARDING_INFO": json.dumps(begins)})
    reseal(four / "checkpoint")
    with pytest.raises(ValueError, match=message) as error:
        load_run(four)
    assert "\n" not in str(error.value)


def test_a_part_that_is_not_among_the_recorded_is_not_read(four):
    before = weights_of(four)
    stray = {name: torch.full_like(value, 7.0) for name, value in before.items()}
    for name in ("model-00005-of-00004.safetensors", "model.safetensors", "optimizer-model.safetensors"):
        safetensors.torch.save_file(stray, four / "checkpoint" / name)
    assert all(torch.equal(value, before[name]) for name, value in weights_of(four).items())
    record = json.loads((four / "checkpoint" / "checkpoint.json").read_text())
    del record["files"]["model-00002-of-00004.safetensors"], record["digest"]
    (four / "checkpoint" / "checkpoint.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"do not make up|of another shape"):
        load_run(four)


def test_what_one_process_wrote_is_read_as_before(tmp_path):
    """Files without places of pieces are whole tensors, as of runs before there were any."""
    run = tmp_path / "run"
    assert main(arguments(tmp_path, "--out", str(run), "--steps", "2")) == 0
    weights = weights_of(run)
    for name in ("model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        path = run / "checkpoint" / name
        safetensors.torch.save_file(safetensors.torch.load_file(path), path)
    reseal(run / "checkpoint")
    assert all(torch.equal(value, weights[name]) for name, value in weights_of(run).items())
    assert main(["--resume", str(run), "--steps", "3"]) == 0
