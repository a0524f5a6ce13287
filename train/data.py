"""Tokens on disk: a corpus, encoded once, kept in a cache and memory-mapped.

The documents of a split are joined, each followed by the end-of-document token, into one array of uint16 (uint32 above
65,536 tokens); where each document begins is kept beside it, and so is the tokenizer. A cache entry is named by the
hash of the text, the tokenizer asked for and FORMAT, and appears whole or not at all.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from train.corpus import Corpus
from train.tokenizer import Tokenizer, load_tokenizer, pieces, train_bpe, train_paper

FORMAT = 2  # raise it when the files of an entry, or how ids come about, change
CHARACTERS_AT_ONCE = 4 << 20


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


def load_data(corpus: Corpus, *, tokenizer: str, vocab_size: int | None, seq_len: int, cache: Path) -> TokenData:
    """Encode both splits, or find them in ``cache``.

    ``tokenizer``: ``bpe`` or ``paper``, trained on the training split to ``vocab_size`` tokens, or the path of a
    tokenizer.json, whose size ``vocab_size`` may exceed but not cut.

    Raises ValueError, leaving nothing in ``cache``, if the vocabulary is larger than the text allows, ids are out of
    its range, or a split is too short for one window of ``seq_len`` + 1 tokens.
    """
    text = corpus.fingerprint()
    asked = tokenizer.encode() if tokenizer in ("bpe", "paper") else Path(tokenizer).read_bytes()
    entry = cache / f"tokens-{_hash(f'{FORMAT} {text} {vocab_size} '.encode() + asked)}"
    if not _is_whole(entry):
        made = _make_tokenizer(corpus, tokenizer, vocab_size)
        created = not cache.exists()
        cache.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                whole = Path(scratch) / "whole"
                whole.mkdir()
                _encode(corpus, made, whole, seq_len=seq_len)
                _put(whole, entry, torn=Path(scratch) / "torn")
        except BaseException:
            if created:
                with contextlib.suppress(OSError):  # another process has put something there
                    cache.rmdir()
            raise
    return _open(entry, corpus, text, name=tokenizer, seq_len=seq_len)


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


def _encode(corpus: Corpus, tokenizer: Tokenizer, directory: Path, *, seq_len: int) -> None:
    """Write an entry's files."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    meta: dict[str, object] = {"dtype": dtype.name}
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
            and np.load(entry / f"{split}.bounds.npy")[-1] == meta[split]
            for split in ("train", "validation")
        )
    except (OSError, ValueError, KeyError, IndexError, EOFError):
        return False


def _open(entry: Path, corpus: Corpus, text: str, *, name: str, seq_len: int) -> TokenData:
    meta = json.loads((entry / "meta.json").read_text())
    tokenizer = load_tokenizer(entry / "tokenizer.json", corpus.train, name=name)
    splits = {}
    for split in ("train", "validation"):
        tokens = np.memmap(entry / f"{split}.tokens", dtype=meta["dtype"], mode="r")
        _check_length(split, len(tokens), seq_len)
        if int(tokens.max()) >= tokenizer.vocab_size:
            raise ValueError(
                f"tokens must be below vocab_size={tokenizer.vocab_size}. Got {tokens.max()} in {entry}, which may be "
                "deleted to encode the text again."
            )
        splits[split] = TokenSplit(tokens, np.load(entry / f"{split}.bounds.npy"))
    fingerprint = _hash(f"{text} {tokenizer.model.to_str()}".encode())
    return TokenData(splits["train"], splits["validation"], tokenizer, meta["lossless"], fingerprint)
