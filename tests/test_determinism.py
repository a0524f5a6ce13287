"""The same command twice: the same weights, moments and rows, bit for bit on a CPU; and one of two in a directory."""

import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tiny_run import arguments

from train import prepare as preparation
from train.metrics import read_metrics
from train.prepare import prepare
from train.run import main, parse

TIMES = ("tokens_per_second", "mfu")


def left_by(directory: Path, name: str, *options: str) -> tuple[dict[str, bytes], list[dict]]:
    """The bytes of the checkpoint's tensors, and the rows of a run without its speed."""
    out = directory / name
    assert main(arguments(directory, "--out", str(out), *options)) == 0
    tensors = {
        f"{path.name} {name}": value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for path in (out / "checkpoint").glob("*.safetensors")
        for name, value in safetensors.torch.load_file(path).items()
    }
    rows = read_metrics(out / "metrics.jsonl")
    return tensors, [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


@pytest.mark.parametrize(
    "options",
    [
        ["--dropout", "0.1"],
        ["--no-fused", "--depth", "uniform:1-3"],
        ["--dtype", "bf16", "--supervision", "gated", "--grad-accumulation", "2"],
    ],
)
def test_a_run_repeated_is_the_same_to_the_bit(tmp_path, options):
    first, second = (left_by(tmp_path, name, *options) for name in ("first", "second"))
    assert len(first[0]) > 50
    assert first[1] == second[1]
    assert [name for name in first[0] if first[0][name] != second[0].get(name)] == []


def test_another_seed_is_another_run(tmp_path):
    first, second = (left_by(tmp_path, seed, "--seed", seed, "--steps", "2") for seed in ("1", "2"))
    assert first[1] != second[1]
    assert first[0] != second[0]


def test_of_runs_that_start_at_the_same_moment_one_gets_the_directory(tmp_path, monkeypatch):
    """All have looked and found it free before any of them begins to write."""
    starters = 4
    assert main(arguments(tmp_path, "--out", str(tmp_path / "warm"), "--steps", "1")) == 0  # fills the cache
    together, write = threading.Barrier(starters), preparation._write_directory

    def at_once(run):
        together.wait(60)
        write(run)

    monkeypatch.setattr(preparation, "_write_directory", at_once)
    config, won, refused = parse(arguments(tmp_path, "--out", str(tmp_path / "run"))), [], []

    def start():
        try:
            won.append(prepare(config))
        except ValueError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(starters)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert len(refused) == starters - 1
    assert all("must not be in use" in line for line in refused), refused
    assert (tmp_path / "run" / "config.json").exists()
    won[0].close()
