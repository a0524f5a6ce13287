import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest
import tokenizers
from tiny_run import text
from tokenizers import decoders, models, normalizers, pre_tokenizers

from looped.whole_file import digest_of
from train.text import cache_entry
from train.text import corpus as corpus_module
from train.text import data as data_module
from train.text.corpus import Corpus, FileState
from train.text.data import cache_directory, encode_corpus, load_data, open_entry
from train.text.documents import Document
from train.text.tokenizer import pieces

TRAIN, HELD_OUT = [text(1500, seed=1), text(700, seed=1)], [text(300, seed=1)]


def corpus_of(train: list[str], validation: list[str]) -> Corpus:
    return Corpus(*([Document.of((document,)) for document in split] for split in (train, validation)))


CORPUS = corpus_of(TRAIN, HELD_OUT)

OPTIONS: dict[str, Any] = {"tokenizer": "bpe", "vocab_size": 300, "seq_len": 16}


def load(cache: Path, corpus: Corpus = CORPUS, **options):
    chosen = OPTIONS | options
    entry = encode_corpus(corpus, cache=cache, **chosen)
    return open_entry(entry, name=chosen["tokenizer"], seq_len=chosen["seq_len"])


def test_documents_are_joined_by_the_end_of_document_token(tmp_path):
    data = load(tmp_path)
    for split, documents in ((data.train, TRAIN), (data.validation, HELD_OUT)):
        assert split.tokens.dtype == np.uint16
        assert all(isinstance(part, np.memmap) for part in split.tokens.parts)
        assert len(split.bounds) == len(documents) + 1
        bounds = np.asarray(split.bounds)
        for document, start, end in zip(documents, bounds[:-1], bounds[1:], strict=True):
            ids = split.tokens[np.arange(start, end)].astype(np.int64)
            assert ids[-1] == data.tokenizer.eos
            assert data.tokenizer.decode(ids[:-1]) == document
        assert bounds[-1] == len(split.tokens)
    assert data.lossless


def test_long_documents_are_encoded_piece_by_piece(tmp_path, monkeypatch):
    whole = load(tmp_path / "whole")
    monkeypatch.setattr(data_module, "CHARACTERS_AT_ONCE", 1000)
    monkeypatch.setattr(data_module, "pieces", lambda parts: pieces(parts, 300))
    parts = load(tmp_path / "parts")
    assert np.array_equal(whole.train.tokens, parts.train.tokens)
    assert np.array_equal(whole.train.bounds, parts.train.bounds)


def test_encoded_text_is_found_again(tmp_path, monkeypatch):
    first = load(tmp_path)
    entries = os.listdir(tmp_path)
    monkeypatch.setattr(data_module, "_encode", None)  # nothing is encoded a second time
    second = load(tmp_path)
    assert np.array_equal(first.train.tokens, second.train.tokens)
    assert second.fingerprint == first.fingerprint
    assert os.listdir(tmp_path) == entries


def test_other_text_and_other_tokenizers_have_their_own_entries(tmp_path):
    variants = [
        load(tmp_path),
        load(tmp_path, corpus_of(TRAIN, [text(400, seed=1)])),
        load(tmp_path, vocab_size=301),
        load(tmp_path, tokenizer="paper", vocab_size=50),
    ]
    assert len({data.fingerprint for data in variants}) == len(variants)
    assert len(os.listdir(tmp_path)) == len(variants)


FILES = ["train-00000.tokens", "train-00000.bounds", "validation-00000.tokens"]
FILES += ["meta.json", "tokenizer.json", "digests.json"]


@pytest.mark.parametrize("damage", ["cut", "flipped"])
@pytest.mark.parametrize("name", FILES)
def test_damaged_entries_are_encoded_again(tmp_path, name, damage, capsys):
    first = load(tmp_path)
    expected = np.asarray(first.train.tokens)
    (entry,) = tmp_path.iterdir()
    content = bytearray((entry / name).read_bytes())
    content[len(content) // 2] ^= 1
    (entry / name).write_bytes(content if damage == "flipped" else content[:-3])
    for said in (f"the cached tokens in {entry} are damaged; the text is encoded again\n", ""):
        again = load(tmp_path)
        assert np.array_equal(again.train.tokens, expected)
        assert again.fingerprint == first.fingerprint
        assert capsys.readouterr().err == said


def test_digests_are_read_once(tmp_path, monkeypatch):
    load(tmp_path / "cache")
    read = []
    monkeypatch.setattr(cache_entry, "digest_of", lambda path: read.append(path) or digest_of(path))
    load(tmp_path / "cache")
    assert read == []
    (tmp_path / "cache").rename(tmp_path / "moved")  # all the same files, perhaps
    for _ in range(2):
        load(tmp_path / "moved")
        assert len(read) == 6
    (entry,) = (tmp_path / "moved").iterdir()
    (entry / "train-00000.tokens").touch()
    load(tmp_path / "moved")
    assert len(read) == 12


def test_what_another_process_has_put_into_the_cache_stays_after_an_error(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        (tmp_path / "cache" / "theirs").mkdir()
        raise ValueError("no")

    monkeypatch.setattr(data_module, "_encode", fail)
    with pytest.raises(ValueError, match=r"^no$"):
        load(tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == ["theirs"]


def test_validation_text_does_not_reach_the_tokenizer(tmp_path):
    other = corpus_of(TRAIN, ["ωψχ φυτ " * 200])
    assert load(tmp_path, other).tokenizer.model.to_str() == load(tmp_path).tokenizer.model.to_str()
    paper = load(tmp_path, other, tokenizer="paper", vocab_size=50)
    assert paper.tokenizer.model.to_str() == load(tmp_path, tokenizer="paper", vocab_size=50).tokenizer.model.to_str()


@pytest.mark.parametrize(
    ("corpus", "options", "message"),
    [
        (CORPUS, {"vocab_size": 100_000}, "vocab_size must be at most"),
        (CORPUS, {"seq_len": 10_000}, "too short: its train split has"),
        (corpus_of(TRAIN, ["a few words"]), {}, "too short: its validation split has"),
    ],
)
def test_failures_leave_nothing_in_the_cache(tmp_path, corpus, options, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "cache", corpus, **options)
    assert not (tmp_path / "cache").exists()


def test_cached_text_may_be_too_short_for_longer_windows(tmp_path):
    load(tmp_path)
    with pytest.raises(ValueError, match=r"takes seq_len \+ 1 = 10001"):
        load(tmp_path, seq_len=10_000)


def word_level(path: Path, vocabulary: dict[str, int]) -> str:
    model = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.save(str(path))
    return str(path)


def test_large_vocabularies_take_four_bytes(tmp_path):
    vocabulary = {"<unk>": 0, "<eos>": 1} | {f"w{number}": number for number in range(2, 70_000)}
    path = word_level(tmp_path / "words.json", vocabulary)
    data = load(tmp_path, corpus_of(["w69999 " * 50], ["w65537 " * 50]), tokenizer=path, vocab_size=None)
    assert data.train.tokens.dtype == np.uint32
    assert data.train.tokens[np.array(0)] == 69_999
    assert np.asarray(data.validation.tokens).tolist() == [65_537] * 50 + [1]
    assert not data.lossless


def test_a_tokenizer_file_neither_cuts_nor_pads_the_text(tmp_path):
    path = tmp_path / "made.json"
    model = load(tmp_path / "cache").tokenizer.model
    model.save(str(path))
    expected = load(tmp_path / "cache", tokenizer=str(path)).train.tokens
    model.enable_truncation(max_length=20)
    model.enable_padding(length=5000)
    model.save(str(path))
    assert np.array_equal(load(tmp_path / "cache", tokenizer=str(path)).train.tokens, expected)


def test_every_byte_of_the_text_must_be_in_its_tokens(tmp_path):
    """Far behind what is decoded to see whether it is given back."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)} | {"<eos>": 256}
    model = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    model.save(str(tmp_path / "bytes.json"))
    document = "ab " * 5000 + "q" + "ab " * 100
    corpus, capitals = corpus_of([document], ["ab " * 20]), corpus_of(["A b " * 99], ["ab " * 20])
    assert load(tmp_path, corpus, tokenizer=str(tmp_path / "bytes.json"), vocab_size=None).lossless
    model.normalizer = normalizers.Lowercase()
    model.save(str(tmp_path / "lower.json"))
    assert not load(tmp_path, capitals, tokenizer=str(tmp_path / "lower.json"), vocab_size=None).lossless
    content = json.loads((tmp_path / "bytes.json").read_text())
    del content["model"]["vocab"]["q"]
    (tmp_path / "no-q.json").write_text(json.dumps(content))
    assert not load(tmp_path, corpus, tokenizer=str(tmp_path / "no-q.json"), vocab_size=None).lossless


def test_text_that_a_tokenizer_cannot_encode(tmp_path):
    path = word_level(tmp_path / "words.json", {"<eos>": 0, "far": 1})
    with pytest.raises(ValueError, match=r"tokenizer .*words.json cannot encode the text"):
        load(tmp_path / "cache", tokenizer=path, vocab_size=None)
    assert not (tmp_path / "cache").exists()


def test_vocabulary_smaller_than_the_tokenizer(tmp_path):
    path = word_level(tmp_path / "words.json", {"<unk>": 0, "<eos>": 1, "far": 40})
    assert load(tmp_path, tokenizer=path, vocab_size=50).tokenizer.vocab_size == 41
    with pytest.raises(
        ValueError, match=r"vocab_size must be at least 41, or tokens .* out of range. Got vocab_size=40"
    ):
        load(tmp_path, tokenizer=path, vocab_size=40)


def write(path: Path, seed: int = 1) -> Path:
    """A text whose length in bytes is the same for every seed."""
    path.write_text((text(3000, seed=seed).replace("é", "e") + "." * 20_000)[:15_000])
    return path


def warm(data: Path | str, cache: Path, monkeypatch, **options):
    """What a start gives that may read neither the text nor all tokens."""
    with monkeypatch.context() as patch:
        for name in ("load_corpus", "encode_corpus"):
            patch.setattr(data_module, name, None)
        patch.setattr(cache_entry, "digest_of", None)
        return load_data(str(data), cache=cache, **(OPTIONS | options))


def assert_cold(data: Path | str, cache: Path, monkeypatch, **options) -> None:
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        warm(data, cache, monkeypatch, **options)


def test_a_warm_start_reads_no_text(tmp_path, monkeypatch):
    for number in range(3):
        write(tmp_path / f"{number}::.txt", seed=number)
    data, cache = str(tmp_path / "*.txt"), tmp_path / "[cache]"
    assert_cold(data, cache, monkeypatch)
    first = load_data(data, cache=cache, **OPTIONS)
    second = warm(data, cache, monkeypatch)
    for split in ("train", "validation"):
        assert np.array_equal(getattr(second, split).tokens, getattr(first, split).tokens)
        assert np.array_equal(getattr(second, split).bounds, getattr(first, split).bounds)
    assert (second.fingerprint, second.lossless) == (first.fingerprint, first.lossless)
    assert second.tokenizer.model.to_str() == first.tokenizer.model.to_str()
    for options in ({"vocab_size": 301}, {"tokenizer": "paper", "vocab_size": 50}):
        assert_cold(data, cache, monkeypatch, **options)
    assert warm(data, cache, monkeypatch, seq_len=20).fingerprint == first.fingerprint
    write(tmp_path / "new.txt")
    assert_cold(data, cache, monkeypatch)


def test_text_that_was_only_touched_is_not_encoded_again(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt")
    first = load_data(str(path), cache=tmp_path / "cache", **OPTIONS)
    moved = path.with_name("b.txt")
    for change in (path.touch, lambda: path.chmod(0o600), lambda: moved.write_bytes(path.read_bytes())):
        time.sleep(0.02)
        change()
        data = moved if moved.exists() else path
        assert_cold(data, tmp_path / "cache", monkeypatch)
        with monkeypatch.context() as patch:
            patch.setattr(data_module, "_encode", None)
            assert load_data(str(data), cache=tmp_path / "cache", **OPTIONS).fingerprint == first.fingerprint
        warm(data, tmp_path / "cache", monkeypatch)
    assert len(os.listdir(tmp_path / "cache")) == 1
    warm(path, tmp_path / "cache", monkeypatch)  # both are known


@pytest.mark.parametrize("how", ["overwritten", "replaced", "link"])
def test_other_text_of_the_same_size_and_time(tmp_path, monkeypatch, how):
    path = write(tmp_path / "a.txt")
    other = write(tmp_path / "other.text", seed=2)
    data = tmp_path / "link.txt"
    data.symlink_to(path)
    first = load_data(str(data), cache=tmp_path / "cache", **OPTIONS)
    time_ns = path.stat().st_mtime_ns
    os.utime(other, ns=(time_ns, time_ns))
    if how == "overwritten":
        path.write_bytes(other.read_bytes())
        os.utime(path, ns=(time_ns, time_ns))
    elif how == "replaced":
        os.replace(other, path)
    else:
        data.unlink()
        data.symlink_to(other)
    assert data.stat().st_size == 15_000
    assert data.stat().st_mtime_ns == time_ns
    assert load_data(str(data), cache=tmp_path / "cache", **OPTIONS).fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("age", "newest", "wait"),
    [
        (0.0, 1_700_000_000_123_456_789, 0.02),
        (0.015, 1_700_000_000_123_456_789, 0.005),
        (0.5, 1_700_000_000_123_456_789, 0.0),
        (-60.0, 1_700_000_000_123_456_789, 0.02),  # another machine's clock
        (0.5, 1_700_000_000_000_000_000, 1.5),  # a file system that keeps whole seconds
        (0.5, 0, 0.0),
    ],
)
def test_what_is_written_after_reading_has_another_time(monkeypatch, age, newest, wait):
    waited: list[float] = []
    now = newest / 1e9 + age if newest else 1.7e9
    monkeypatch.setattr(data_module, "time", SimpleNamespace(time=lambda: now, sleep=waited.append))
    data_module._let_the_clock_move_on(FileState("", newest))
    assert waited == pytest.approx([wait], abs=1e-5)


@pytest.mark.parametrize("moment", ["fingerprint", "_make_tokenizer"])
def test_text_that_is_written_while_it_is_read_is_refused(tmp_path, monkeypatch, moment):
    """It is read several times. What is encoded must be what the entry is named by."""
    path = write(tmp_path / "a.txt")
    owner = Corpus if moment == "fingerprint" else data_module
    before = getattr(owner, moment)

    def and_write(*arguments):
        result = before(*arguments)
        write(path, seed=2)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, moment, and_write)
        with pytest.raises(ValueError, match=r"^the text must stay as it is while it is read. Its files have changed"):
            load_data(str(path), cache=tmp_path / "cache", **OPTIONS)
    assert not (tmp_path / "cache").exists()
    assert len(load_data(str(path), cache=tmp_path / "cache", **OPTIONS).train.tokens) > 1000


def test_text_that_is_gone_before_it_is_encoded_is_named(tmp_path, monkeypatch):
    """It is not the cache that is to blame."""
    path, make = tmp_path / "a.jsonl", data_module._make_tokenizer
    path.write_text("".join(json.dumps({"text": text(300, seed=seed)}) + "\n" for seed in range(40)), encoding="utf-8")
    monkeypatch.setattr(data_module, "_make_tokenizer", lambda *given: (make(*given), path.unlink())[0])
    with pytest.raises(ValueError, match=rf"^data file {path} cannot be read \(FileNotFoundError"):
        load_data(str(path), cache=tmp_path / "cache", **OPTIONS)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("damage", ["train-00000.tokens", "meta.json", "checked"])
def test_a_warm_start_sees_a_damaged_entry(tmp_path, monkeypatch, damage):
    path = write(tmp_path / "a.txt")
    first = load_data(str(path), cache=tmp_path / "cache", **OPTIONS)
    (entry,) = (tmp_path / "cache").iterdir()
    torn = entry / damage
    torn.write_bytes(torn.read_bytes()[:-1])
    assert_cold(path, tmp_path / "cache", monkeypatch)
    again = load_data(str(path), cache=tmp_path / "cache", **OPTIONS)
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(again.train.tokens, first.train.tokens)
    warm(path, tmp_path / "cache", monkeypatch)


def test_a_cache_that_cannot_be_written_is_used(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt")
    first = load_data(str(path), cache=tmp_path / "cache", **OPTIONS)
    (entry,) = (tmp_path / "cache").iterdir()
    (entry / "sources").rename(entry / "elsewhere")
    (entry / "sources").touch()  # as good as a directory without permission, to whom permissions do not bind
    for _ in range(2):
        assert load_data(str(path), cache=tmp_path / "cache", **OPTIONS).fingerprint == first.fingerprint


def test_known_texts_start_warm_too(tmp_path, monkeypatch):
    rows = [" = One = \n", text(1500, seed=1), " = Two = \n", text(700, seed=2)]
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *arguments, **options: None)
        both = {"train": rows, "validation": rows[2:]}
        splits = {split: datasets.Dataset.from_dict({"text": texts}) for split, texts in both.items()}
        patch.setattr(datasets, "load_dataset", lambda *arguments, **options: splits)
        load_data("wikitext-103", cache=tmp_path, **OPTIONS)
    assert len(warm("wikitext-103", tmp_path, monkeypatch).train.bounds) == 3
    speeches = corpus_module._speeches()[-12:]
    monkeypatch.setattr(corpus_module, "_speeches", lambda: speeches)
    first = load_data("sotu", cache=tmp_path, **OPTIONS)
    assert len(first.train.bounds) + len(first.validation.bounds) == 12 + 2
    assert warm("sotu", tmp_path, monkeypatch).fingerprint == first.fingerprint


def test_cache_directory(monkeypatch, tmp_path):
    assert cache_directory(tmp_path) == tmp_path
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory(None) == tmp_path / "looped-lm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory(None) == Path.home() / ".cache" / "looped-lm"
