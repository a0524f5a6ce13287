"""Tokens on disk: a corpus, encoded once, kept in a cache and memory-mapped.

The documents of a split are joined, each followed by the end-of-document token, into one array of uint16 (uint32 above
65,536 tokens); where each document begins is kept beside it, and so is the tokenizer. A cache entry is named by the
hash of the text, the tokenizer asked for and FORMAT, and appears whole or not at all.

An entry also knows the files that its text was read from, by name, size and times, so that a later start finds it
without reading them: ``sources`` holds a small file for each state of the text that led here.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from train.corpus import Corpus, FileState, file_state, load_corpus, text_state
from train.tokenizer import Tokenizer, load_tokenizer, pieces, train_bpe, train_paper

FORMAT = 3  # raise it when the files of an entry, or how documents are read or ids come about, change
CHARACTERS_AT_ONCE = 4 << 20
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class TokenSplit:
    """tokens: [n] uint16 or uint32, memory-mapped. bounds: [documents + 1] int64; document i is bounds[i:i+2]."""

    tokens: np.ndarray
    bounds: np.ndarray


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
    """Encode both splits, or find them in ``cache``. Returns the entry, whose tokens are checked.

    ``tokenizer``: ``bpe`` or ``paper``, trained on the training split to ``vocab_size`` tokens, or the path of a
    tokenizer.json, whose size ``vocab_size`` may exceed but not cut.

    Raises ValueError, leaving nothing in ``cache``, if the vocabulary is larger than the text allows, ids are out of
    its range, or a split is too short for one window of ``seq_len`` + 1 tokens.
    """
    text = corpus.fingerprint()
    entry = cache / _name(text, _asked(tokenizer, vocab_size))
    if not _is_whole(entry):
        made = _make_tokenizer(corpus, tokenizer, vocab_size)
        created = not cache.exists()
        cache.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                whole = Path(scratch) / "whole"
                (whole / "sources").mkdir(parents=True)
                _encode(corpus, text, made, whole, seq_len=seq_len)
                _put(whole, entry, torn=Path(scratch) / "torn")
        except BaseException:
            if created:
                with contextlib.suppress(OSError):  # another process has put something there
                    cache.rmdir()
            raise
    _check_range(entry)
    return entry


def _asked(tokenizer: str, vocab_size: int | None) -> bytes:
    """What tells one tokenizer from another before it is made."""
    return f"{vocab_size} ".encode() + (
        tokenizer.encode() if tokenizer in ("bpe", "paper") else Path(tokenizer).read_bytes()
    )


def _name(text: str, asked: bytes) -> str:
    return f"tokens-{_hash(f'{FORMAT} {text} '.encode() + asked)}"


def _entry_of(state: FileState, asked: bytes, cache: Path) -> Path | None:
    """The entry that this state of the text has led to, if it is whole and its tokens are as they were then."""
    for source in cache.glob(f"tokens-*/sources/{_source(state, asked)}"):
        entry = source.parent.parent
        if _is_whole(entry) and source.read_text(encoding="utf-8") == _tokens_state(entry):
            return entry
    return None


def _remember(state: FileState, asked: bytes, entry: Path) -> None:
    """Let ``_entry_of`` find an entry whose tokens have been checked. A cache that may not be written forgets it."""
    with contextlib.suppress(OSError):
        (entry / "sources" / _source(state, asked)).write_text(_tokens_state(entry), encoding="utf-8")


def _source(state: FileState, asked: bytes) -> str:
    return _hash(f"{FORMAT} {state.key} ".encode() + asked)


def _tokens_state(entry: Path) -> str:
    return file_state([entry / f"{split}.tokens" for split in SPLITS]).key


def _let_the_clock_move_on(state: FileState) -> None:
    """Wait until whatever is written from now on has another time than what was written last.

    Clocks of file systems tick every few milliseconds; some keep whole seconds only.
    """
    tick = 2.0 if state.newest % 10**9 == 0 else 0.02
    time.sleep(max(0.0, min(tick, state.newest / 1e9 + tick - time.time())))


def _put(whole: Path, entry: Path, *, torn: Path) -> None:
    """Give a new entry its name. What another process has put there in the meantime stays, unless it is torn."""
    try:
        os.rename(whole, entry)
    except OSError:
        if not _is_whole(entry):
            os.rename(entry, torn)
            os.rename(whole, entry)


def _hash(text: bytes) -> str:
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def _make_tokenizer(corpus: Corpus, tokenizer: str, vocab_size: int | None) -> Tokenizer:
    if tokenizer in ("bpe", "paper"):
        assert vocab_size is not None
        return (train_bpe if tokenizer == "bpe" else train_paper)(corpus.train, vocab_size)
    loaded = load_tokenizer(Path(tokenizer), corpus.train)
    if vocab_size is not None and vocab_size < loaded.vocab_size:
        raise ValueError(
            f"vocab_size must be at least {loaded.vocab_size}, or tokens of {tokenizer} are out of range. "
            f"Got vocab_size={vocab_size}."
        )
    return loaded


def _encode(corpus: Corpus, text: str, tokenizer: Tokenizer, directory: Path, *, seq_len: int) -> None:
    """Write an entry's files. ``text``: the hash of the corpus."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    meta: dict[str, object] = {"text": text, "vocab_size": tokenizer.vocab_size, "dtype": dtype.name}
    lossless = tokenizer.lossless
    total = sum(map(len, corpus.train)) + sum(map(len, corpus.validation))
    with tqdm(total=total, desc="encoding", unit="char", unit_scale=True, disable=None, leave=False) as bar:
        for split, documents in (("train", corpus.train), ("validation", corpus.validation)):
            bounds = [0]
            with open(directory / f"{split}.tokens", "wb") as file:
                for group in _groups(documents):
                    texts = [text for text, _ in group]
                    for (text, ends), ids in zip(group, tokenizer.encode(texts), strict=True):
                        lossless = lossless and tokenizer.bytes_per_token[ids].sum() == len(text.encode())
                        file.write(np.append(ids, [tokenizer.eos] * ends).astype(dtype).tobytes())
                        if ends:
                            bounds.append(file.tell() // dtype.itemsize)
                    bar.update(sum(map(len, texts)))
            np.save(directory / f"{split}.bounds.npy", np.array(bounds, dtype=np.int64))
            _check_length(split, bounds[-1], seq_len)
            meta[split] = bounds[-1]
    tokenizer.model.save(str(directory / "tokenizer.json"))
    (directory / "meta.json").write_text(json.dumps(meta | {"lossless": bool(lossless)}))


def _groups(documents: list[str]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces of the documents, each with whether it ends its document, in groups of a few million characters."""
    group: list[tuple[str, bool]] = []
    size = 0
    for document in documents:
        parts = list(pieces(document))
        for number, part in enumerate(parts, start=1):
            group.append((part, number == len(parts)))
            size += len(part)
            if size >= CHARACTERS_AT_ONCE:
                yield group
                group, size = [], 0
    if group:
        yield group


def _check_length(split: str, n_tokens: int, seq_len: int) -> None:
    if n_tokens < seq_len + 1:
        raise ValueError(
            f"text is too short: its {split} split has {n_tokens} tokens, and one window takes "
            f"seq_len + 1 = {seq_len + 1}. Give more text or a smaller --seq-len."
        )


def _is_whole(entry: Path) -> bool:
    """Whether a cache entry has every file at its size; a power failure may tear one."""
    try:
        meta = json.loads((entry / "meta.json").read_text())
        size = np.dtype(meta["dtype"]).itemsize
        return (entry / "tokenizer.json").stat().st_size > 0 and all(
            (entry / f"{split}.tokens").stat().st_size == size * meta[split]
            and np.load(entry / f"{split}.bounds.npy", mmap_mode="r")[-1] == meta[split]
            for split in SPLITS
        )
    except (OSError, ValueError, KeyError, IndexError, EOFError):
        return False


def _check_range(entry: Path) -> None:
    """Reads every token. Raises ValueError if one is not in the vocabulary: the file is damaged."""
    meta = json.loads((entry / "meta.json").read_text())
    for split in SPLITS:
        largest = np.memmap(entry / f"{split}.tokens", dtype=meta["dtype"], mode="r").max()
        if largest >= meta["vocab_size"]:
            raise ValueError(
                f"tokens must be below vocab_size={meta['vocab_size']}. Got {largest} in {entry}, which may be deleted "
                "to encode the text again."
            )


def open_entry(entry: Path, *, name: str, seq_len: int) -> TokenData:
    """Map an entry's files. ``name``: its tokenizer's. Raises ValueError if a split is too short for one window."""
    meta = json.loads((entry / "meta.json").read_text())
    tokenizer = load_tokenizer(entry / "tokenizer.json", [], name=name)
    tokenizer = dataclasses.replace(tokenizer, lossless=meta["lossless"])
    splits = {}
    for split in SPLITS:
        tokens = np.memmap(entry / f"{split}.tokens", dtype=meta["dtype"], mode="r")
        _check_length(split, len(tokens), seq_len)
        splits[split] = TokenSplit(tokens, np.load(entry / f"{split}.bounds.npy"))
    fingerprint = _hash(f"{meta['text']} {tokenizer.model.to_str()}".encode())
    return TokenData(splits["train"], splits["validation"], tokenizer, meta["lossless"], fingerprint)
