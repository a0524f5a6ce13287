"""Tokens in several files, written by processes that may be killed, or that want the same at once."""

import itertools
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked_runs import ended, forked
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import text

from looped import run_directory
from train.source import Text
from train.text import cache_entry, shards
from train.text import data as data_module
from train.text.batches import Windows
from train.text.data import TokenData, load_data
from train.text.shards import Shards

OPTIONS: dict[str, Any] = {"tokenizer": "bpe", "vocab_size": 300, "seq_len": 16}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 4000)
    monkeypatch.setattr(data_module, "CHARACTERS_AT_ONCE", 1500)
    monkeypatch.setattr(data_module, "pieces", lambda parts: data_module_pieces(parts, 400))


data_module_pieces = data_module.pieces


@pytest.fixture
def texts(tmp_path) -> str:
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(text(1000, seed=number), encoding="utf-8")
    return str(tmp_path / "*.txt")


def load(texts: str, cache: Path) -> TokenData:
    return load_data(texts, cache=cache, **OPTIONS)


def assert_equal(found: TokenData, expected: TokenData) -> None:
    for split in ("train", "validation"):
        for name in ("tokens", "bounds"):
            arrays = [np.asarray(getattr(getattr(data, split), name)) for data in (found, expected)]
            assert np.array_equal(*arrays)
    assert (found.fingerprint, found.lossless) == (expected.fingerprint, expected.lossless)


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(lambda lengths: sum(lengths) > 5),
    seq_len=st.integers(1, 4),
    stride=st.integers(1, 5),
)
def test_windows_across_files_are_those_of_one_array(lengths, seq_len, stride):
    whole = np.random.default_rng(0).integers(0, 1000, size=sum(lengths)).astype(np.uint16)
    parts = Shards(np.split(whole, np.cumsum(lengths)[:-1]))
    found, expected = Windows(parts, seq_len, stride), Windows(whole, seq_len, stride)
    assert len(found) == len(expected)
    indices = np.arange(len(expected) + 1)[::-1]  # the last is filled up
    for one, other in zip(found.gather(indices), expected.gather(indices), strict=True):
        assert np.array_equal(one, other)
    assert np.array_equal(parts, whole)
    assert parts[np.arange(0)].shape == (0,)


def test_positions_beyond_the_end():
    parts = Shards([np.arange(3), np.arange(2)])
    for positions in ([-1], [0, 5]):
        with pytest.raises(IndexError, match=r"positions must be from 0 to 4. Got "):
            parts[np.array(positions)]


def test_a_split_in_files_is_that_in_one(texts, tmp_path, monkeypatch):
    many = load(texts, tmp_path / "many")
    assert len(many.train.tokens.parts) >= 4
    assert all(4000 <= part.nbytes < 8000 for part in many.train.tokens.parts[:-1])
    monkeypatch.setattr(shards, "SHARD_BYTES", 1 << 28)
    one = load(texts, tmp_path / "one")
    assert len(one.train.tokens.parts) == 1
    assert_equal(many, one)


def test_a_process_reads_its_rows_alone(texts, tmp_path, monkeypatch):
    data = load(texts, tmp_path / "cache")
    source = Text("texts", data, Windows(data.train.tokens, 16, 16))
    whole = source.batch(7, seed=3, batch_size=8)
    gathered = []
    gather = Windows.gather
    monkeypatch.setattr(Windows, "gather", lambda self, indices: gathered.append(len(indices)) or gather(self, indices))
    for world in (1, 2, 4):
        ranks = [source.batch(7, seed=3, batch_size=8, rank=rank, world=world) for rank in range(world)]
        for number in range(2):
            assert np.array_equal(np.concatenate([rank[number] for rank in ranks]), whole[number])
    assert gathered == [8, 4, 4, 2, 2, 2, 2]


def begin(texts: str, cache: Path, kill_at: int = 0) -> tuple[int, Path]:
    """A process that encodes ``texts``, and kills itself before it encodes group ``kill_at`` of them; its stderr."""
    write, groups = data_module._write_group, itertools.count(1)

    def counted(*arguments: Any) -> None:
        if next(groups) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02)
        write(*arguments)

    def encode() -> int:
        data_module._write_group = counted
        load(texts, cache)
        return 0

    errors = cache.with_name("errors")
    with open(errors, "wb") as file:
        return forked(encode, file.fileno(), file.fileno()), errors


def test_a_killed_process_has_lost_the_last_file_alone(texts, tmp_path, monkeypatch):
    expected = load(texts, tmp_path / "whole")
    cache = tmp_path / "cache"
    child, errors = begin(texts, cache, kill_at=15)
    assert ended([child], errors.read_text) == [-signal.SIGKILL]
    (staging,) = cache.iterdir()
    assert staging.name.startswith("unfinished-tokens-")
    kept = {path.name: path.stat().st_mtime_ns for path in staging.glob("train-*.tokens")}
    assert len(kept) >= 3
    written: list[int] = []
    write = data_module._write_group

    def counted(writer, *arguments):
        written.append(writer.start)
        write(writer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(data_module, "_write_group", counted)
        patch.setattr(data_module, "train_bpe", None)  # nor is the tokenizer trained again
        assert_equal(load(texts, cache), expected)
    (entry,) = cache.iterdir()
    assert min(written[: len(written) // 2]) >= sum(map(len, expected.train.tokens.parts[: len(kept)]))
    assert {name: (entry / name).stat().st_mtime_ns for name in kept} == kept
    assert {path.name for path in entry.iterdir()} == {path.name for path in (tmp_path / "whole").glob("*/*")}


@pytest.mark.parametrize(
    "damage", ["train-00001.tokens", "train-00001.bounds", "train-00001.shard.json", "tokenizer.json"]
)
def test_a_damaged_file_of_a_killed_process_is_written_again(texts, tmp_path, monkeypatch, damage):
    expected = load(texts, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(data_module, "_check_length", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load(texts, tmp_path / "cache")
    (staging,) = (tmp_path / "cache").iterdir()
    content = (staging / damage).read_bytes()
    (staging / damage).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert_equal(load(texts, tmp_path / "cache"), expected)


def interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_process_leaves_no_half_files(texts, tmp_path, monkeypatch):
    write = data_module._write_group

    def second_file_is_interrupted(writer, *arguments):
        write(writer, *arguments)
        if writer.start > 0:
            interrupt()

    monkeypatch.setattr(data_module, "_write_group", second_file_is_interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(texts, tmp_path / "cache")
    (staging,) = (tmp_path / "cache").iterdir()
    names = {path.name for path in staging.iterdir()}
    first = {f"train-00000.{ending}" for ending in ("tokens", "bounds", "shard.json")}
    assert names == first | {"tokenizer.json", "tokenizer.digest"}


def test_processes_that_want_the_same_at_once(texts, tmp_path, capsys):
    child, errors = begin(texts, tmp_path / "cache")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("cache/*/tokenizer.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        mine = load(texts, tmp_path / "cache")
    finally:
        codes = ended([child], errors.read_text)
    assert codes == [0]
    assert errors.read_text() == ""
    assert "waiting for another process" in capsys.readouterr().err
    assert_equal(mine, load(texts, tmp_path / "whole"))
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_process_waits_for_the_one_that_is_first(texts, tmp_path, monkeypatch, capsys):
    theirs: list[TokenData] = []
    hold = cache_entry.hold

    def second(staging: Path) -> int | None:
        monkeypatch.setattr(cache_entry, "hold", hold)
        theirs.append(load(texts, tmp_path / "cache"))  # begun later, done earlier
        raise ValueError("out must not be in use")

    monkeypatch.setattr(cache_entry, "hold", second)
    mine = load(texts, tmp_path / "cache")
    files = [Path(data.train.tokens.parts[0].filename).stat() for data in (mine, *theirs)]  # type: ignore[attr-defined]
    assert os.path.samestat(*files)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert capsys.readouterr().err == "waiting for another process, which encodes the same text\n"


def test_without_locks_an_entry_of_a_process_that_was_first_stays(texts, tmp_path, monkeypatch):
    """As on a system without flock."""
    monkeypatch.setattr(run_directory, "fcntl", None)
    encode = data_module._encode
    theirs: list[TokenData] = []

    def encode_second(*arguments, **options):
        monkeypatch.setattr(data_module, "_encode", encode)
        theirs.append(load(texts, tmp_path / "cache"))
        return encode(*arguments, **options)

    monkeypatch.setattr(data_module, "_encode", encode_second)
    assert_equal(load(texts, tmp_path / "cache"), theirs[0])
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_full_disk_is_one_line_and_what_is_done_stays(texts, tmp_path, monkeypatch):
    finish, done = shards.ShardWriter.finish, []

    def full_after_two(self, groups):
        if len(done) == 2:
            raise OSError(28, "No space left on device")
        done.append(groups)
        return finish(self, groups)

    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardWriter, "finish", full_after_two)
        with pytest.raises(ValueError, match=r"^cache .* cannot be written \(No space left on device\). What has been"):
            load(texts, tmp_path / "cache")
    (staging,) = (tmp_path / "cache").iterdir()
    assert len(list(staging.glob("*.tokens"))) == 2
    assert_equal(load(texts, tmp_path / "cache"), load(texts, tmp_path / "whole"))
