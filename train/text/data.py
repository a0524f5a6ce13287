"""Tokens on disk: a corpus, encoded once, kept in a cache and memory-mapped.

The documents of a split are joined, each followed by the end-of-document token, into one array of uint16 (uint32 above
65,536 tokens), in files of bounded size (shards.py); where each document begins is kept beside it, and so is the
tokenizer. A cache entry is named by the hash of the text, the tokenizer asked for and FORMAT, and appears whole or not
at all (cache_entry.py). While it is made, the text is a stream: it is read several times, and neither it nor the
tokens are in memory. Files that are finished when the process is killed are not made again.

An entry also knows the files that its text was read from, by name, size and times, so that a later start finds it
without reading them: ``sources`` holds an empty file for each state of the text that led here.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from looped.whole_file import digest_of, replacing
from train.text.cache_entry import is_whole, make_entry
from train.text.corpus import Corpus, FileState, Fingerprint, load_corpus, text_state
from train.text.documents import Document
from train.text.shards import Shard, Shards, ShardWriter, finished, names_of
from train.text.tokenizer import Tokenizer, load_tokenizer, pieces, sample, train_bpe, train_paper

FORMAT = 4  # raise it when the files of an entry, how documents are read or grouped, or how ids come about, change
CHARACTERS_AT_ONCE = 4 << 20  # encoded by all cores together
CHARACTERS_TRIED = 10_000  # of a text, to see whether a tokenizer gives it back
SPLITS = ("train", "validation")

Item = TypeVar("Item")


@dataclass(frozen=True)
class TokenSplit:
    """tokens: [n] uint16 or uint32, memory-mapped. bounds: [documents + 1] int64; document i is bounds[i:i+2]."""

    tokens: Shards
    bounds: Shards


@dataclass(frozen=True)
class TokenData:
    """Both encoded splits and their tokenizer.

    ``lossless``: every token of this text stands for known bytes, so bits per byte are defined. ``fingerprint``: of
    text and tokenizer, for a resumed run to see that neither has changed.
    """

    train: TokenSplit
    validation: TokenSplit
    tokenizer: Tokenizer
    lossless: bool
    fingerprint: str


def cache_directory(cache: Path | None) -> Path:
    """``cache``, or looped-lm under $XDG_CACHE_HOME, or under ~/.cache."""
    if cache is not None:
        return cache
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "looped-lm"


def load_data(data: str, *, tokenizer: str, vocab_size: int | None, seq_len: int, cache: Path) -> TokenData:
    """The text of ``data``, encoded, for a run. If ``cache`` has it and no file has changed, no text is read.

    Raises ValueError as ``load_corpus`` and ``encode_corpus`` do.
    """
    state = text_state(data)
    asked = _asked(tokenizer, vocab_size)
    entry = _entry_of(state, asked, cache)
    if entry is None:
        _let_the_clock_move_on(state)
        corpus = load_corpus(data)
        entry = encode_corpus(corpus, tokenizer=tokenizer, vocab_size=vocab_size, seq_len=seq_len, cache=cache)
        _remember(state, asked, entry)  # the state from before reading: what was written since is another
    return open_entry(entry, name=tokenizer, seq_len=seq_len)


def encode_corpus(corpus: Corpus, *, tokenizer: str, vocab_size: int | None, seq_len: int, cache: Path) -> Path:
    """Encode both splits, or find them in ``cache``. Returns the entry.

    ``tokenizer``: ``bpe`` or ``paper``, trained on the training split to ``vocab_size`` tokens, or the path of a
    tokenizer.json, whose size ``vocab_size`` may exceed but not cut.

    Raises ValueError, leaving nothing in ``cache``, if the vocabulary is larger than the text allows, ids are out of
    its range, a split is too short for one window of ``seq_len`` + 1 tokens, or the text changes while it is read.
    """
    text = corpus.fingerprint()
    entry = cache / f"tokens-{_hash(f'{FORMAT} {text.hexdigest()} '.encode() + _asked(tokenizer, vocab_size))}"

    def fill(directory: Path) -> dict[str, str]:
        made = _kept_tokenizer(directory, tokenizer)
        if made is None:
            made = _make_tokenizer(corpus, text.n_bytes, tokenizer, vocab_size)
            _keep_tokenizer(directory, made)
        return _encode(corpus, text, made, directory, seq_len=seq_len)

    make_entry(entry, fill)
    return entry


def _asked(tokenizer: str, vocab_size: int | None) -> bytes:
    """What tells one tokenizer from another before it is made."""
    return f"{vocab_size} ".encode() + (
        tokenizer.encode() if tokenizer in ("bpe", "paper") else Path(tokenizer).read_bytes()
    )


def _entry_of(state: FileState, asked: bytes, cache: Path) -> Path | None:
    """The entry that this state of the text has led to, if it is whole."""
    found = cache.glob(f"tokens-*/sources/{_source(state, asked)}")
    return next((source.parent.parent for source in found if is_whole(source.parent.parent)), None)


def _remember(state: FileState, asked: bytes, entry: Path) -> None:
    """Let ``_entry_of`` find an entry. A cache that may not be written forgets it."""
    with contextlib.suppress(OSError):
        (entry / "sources").mkdir(exist_ok=True)
        (entry / "sources" / _source(state, asked)).touch()


def _source(state: FileState, asked: bytes) -> str:
    return _hash(f"{FORMAT} {state.key} ".encode() + asked)


def _let_the_clock_move_on(state: FileState) -> None:
    """Wait until whatever is written from now on has another time than what was written last.

    Clocks of file systems tick every few milliseconds; some keep whole seconds only.
    """
    tick = 2.0 if state.newest % 10**9 == 0 else 0.02
    time.sleep(max(0.0, min(tick, state.newest / 1e9 + tick - time.time())))


def _hash(text: bytes) -> str:
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def _make_tokenizer(corpus: Corpus, n_bytes: int, tokenizer: str, vocab_size: int | None) -> Tokenizer:
    """``n_bytes``: of the corpus."""
    if tokenizer in ("bpe", "paper"):
        assert vocab_size is not None
        texts = (piece for document in corpus.train for piece in pieces(document.parts))
        return (train_bpe if tokenizer == "bpe" else train_paper)(sample(texts, n_bytes), vocab_size)
    loaded = load_tokenizer(Path(tokenizer))
    if vocab_size is not None and vocab_size < loaded.vocab_size:
        raise ValueError(
            f"vocab_size must be at least {loaded.vocab_size}, or tokens of {tokenizer} are out of range. "
            f"Got vocab_size={vocab_size}."
        )
    return loaded


def _keep_tokenizer(directory: Path, tokenizer: Tokenizer) -> None:
    with replacing(directory / "tokenizer.json") as scratch:
        scratch.write_text(tokenizer.model.to_str(pretty=True), encoding="utf-8")  # its save raises bare Exception
        digest = digest_of(scratch)
    (directory / "tokenizer.digest").write_text(digest, encoding="utf-8")


def _kept_tokenizer(directory: Path, name: str) -> Tokenizer | None:
    """The tokenizer that was made before the process was killed."""
    try:
        if (directory / "tokenizer.digest").read_text(encoding="utf-8") != digest_of(directory / "tokenizer.json"):
            return None
    except (FileNotFoundError, UnicodeError):
        return None
    return load_tokenizer(directory / "tokenizer.json", name=name)


def _encode(
    corpus: Corpus, text: Fingerprint, tokenizer: Tokenizer, directory: Path, *, seq_len: int
) -> dict[str, str]:
    """Write an entry's files. Returns their digests. ``text``: of the corpus, as it was when it was looked for."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    seen = Fingerprint()
    shards: dict[str, list[Shard]] = {}
    with tqdm(total=text.n_bytes, desc="encoding", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for split, documents in (("train", corpus.train), ("validation", corpus.validation)):
            groups = ahead(_groups(seen.watch(documents)))
            shards[split] = _encode_split(groups, tokenizer, dtype, directory, split, bar)
            _check_length(split, shards[split][-1].end, seq_len)
    if seen.hexdigest() != text.hexdigest():
        raise ValueError("the text must stay as it is while it is read. Its files have changed meanwhile.")
    every = [shard for split in SPLITS for shard in shards[split]]
    meta = {
        "text": text.hexdigest(),
        "dtype": dtype.name,
        "lossless": all(shard.lossless for shard in every),
        **{split: [shard.tokens for shard in shards[split]] for split in SPLITS},
    }
    (directory / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    digests = {name: digest_of(directory / name) for name in ("meta.json", "tokenizer.json")}
    return digests | {name: digest for shard in every for name, digest in shard.digests.items()}


def _encode_split(
    groups: Iterable["Group"], tokenizer: Tokenizer, dtype: np.dtype, directory: Path, split: str, bar: tqdm
) -> list[Shard]:
    """Encode what is not encoded yet. A shard ends where a group of the text does, so that it can be gone on with."""
    shards = finished(directory, split)
    done = shards[-1].groups if shards else 0
    writer: ShardWriter | None = None
    number = 0
    try:
        for number, group in enumerate(groups, start=1):
            if number > done:
                if writer is None:
                    writer = ShardWriter(directory, split, len(shards), shards[-1].end if shards else 0)
                _write_group(writer, group, tokenizer, dtype)
                if writer.full:
                    shards.append(writer.finish(number))
                    writer = None
            bar.update(int(group.n_bytes.sum()))
        if writer is not None:
            shards.append(writer.finish(number))
    except BaseException:
        if writer is not None:
            writer.abandon()
        raise
    return shards


@dataclass(frozen=True)
class Group:
    """Pieces of text that are encoded together. n_bytes: of each, in UTF-8. ends: numbers of those that end a
    document."""

    texts: list[str]
    n_bytes: np.ndarray
    ends: list[int]


def _write_group(writer: ShardWriter, group: Group, tokenizer: Tokenizer, dtype: np.dtype) -> None:
    encoded = tokenizer.encode(group.texts)
    ids = np.concatenate(encoded)
    ends = np.cumsum([len(each) for each in encoded])
    lossless = tokenizer.gives_back([text[:CHARACTERS_TRIED] for text in group.texts[:: max(1, len(encoded) // 8)]])
    if lossless:
        n_bytes = np.cumsum(tokenizer.bytes_per_token[ids])
        lossless = bool((np.append(0, n_bytes)[ends] == np.cumsum(group.n_bytes)).all())
    ends = ends[group.ends]
    tokens = np.insert(ids, ends, tokenizer.eos).astype(dtype)
    writer.add(tokens, ends + np.arange(1, len(ends) + 1), lossless=lossless)


def _groups(documents: Iterable[Document]) -> Iterator[Group]:
    """The pieces of the documents, in groups of a few million characters."""
    texts: list[str] = []
    ends: list[int] = []
    size = 0
    for document in documents:
        for piece in pieces(document.parts):
            if size >= CHARACTERS_AT_ONCE:
                yield _group(texts, ends)
                texts, ends, size = [], [], 0
            texts.append(piece)
            size += len(piece)
        ends.append(len(texts) - 1)
    yield _group(texts, ends)


def _group(texts: list[str], ends: list[int]) -> Group:
    return Group(texts, np.array([len(text.encode()) for text in texts]), ends)


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The items, each made by a thread while the one before is used."""
    iterator = iter(items)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, iterator, None)
        while (item := future.result()) is not None:
            future = pool.submit(next, iterator, None)
            yield item


def _check_length(split: str, n_tokens: int, seq_len: int) -> None:
    if n_tokens < seq_len + 1:
        raise ValueError(
            f"text is too short: its {split} split has {n_tokens} tokens, and one window takes "
            f"seq_len + 1 = {seq_len + 1}. Give more text or a smaller --seq-len."
        )


def open_entry(entry: Path, *, name: str, seq_len: int) -> TokenData:
    """Map an entry's files. ``name``: its tokenizer's. Raises ValueError if a split is too short for one window."""
    meta = json.loads((entry / "meta.json").read_text())
    tokenizer = load_tokenizer(entry / "tokenizer.json", name=name)
    splits = {}
    for split in SPLITS:
        names = [names_of(split, number) for number in range(len(meta[split]))]
        tokens = Shards([np.memmap(entry / each[0], dtype=meta["dtype"], mode="r") for each in names])
        _check_length(split, len(tokens), seq_len)
        splits[split] = TokenSplit(tokens, Shards([_mapped(entry / each[1]) for each in names]))
    fingerprint = _hash(f"{meta['text']} {tokenizer.model.to_str()}".encode())
    return TokenData(splits["train"], splits["validation"], tokenizer, meta["lossless"], fingerprint)


def _mapped(path: Path) -> np.ndarray:
    """Bounds. Of a shard within a document there are none, and an empty file cannot be mapped."""
    return np.memmap(path, dtype=np.int64, mode="r") if path.stat().st_size else np.empty(0, dtype=np.int64)
