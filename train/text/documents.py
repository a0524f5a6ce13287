"""Documents, and the files that they are read from.

A document is text in parts, so that one of any size is read in bounded memory. A .txt file is one document. A row of a
.jsonl or .parquet file is one, in its column ``text``. Text is UTF-8, with or without a byte-order mark; in a .txt file
every end of a line becomes a newline. .txt and .jsonl files may be compressed (.gz). Blank documents are left out.
"""

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from json import JSONDecodeError
from pathlib import Path
from typing import Protocol, TypeVar

PART = 1 << 20  # characters of a .txt file that are read at once
LONGEST_ROW = 1 << 26  # bytes of a line of .jsonl; Python's objects for a line of brackets take thirty times as many
FILES = ".txt, .jsonl or .parquet files (the first two may end in .gz)"

Item = TypeVar("Item")


@dataclass(frozen=True)
class Document:
    """parts: its text, in order; they can be gone through again. n_bytes: of the text in UTF-8. key: 64 bits of its
    hash. blank: whether it has nothing but white space."""

    parts: Iterable[str]
    n_bytes: int
    key: int
    blank: bool

    @classmethod
    def of(cls, parts: Iterable[str]) -> "Document":
        """The document whose text is ``parts``, which are gone through once."""
        digest, n_bytes, blank = hashlib.blake2b(digest_size=8), 0, True
        for part in parts:
            encoded = part.encode()
            digest.update(encoded)
            n_bytes += len(encoded)
            blank = blank and not part.strip()
        return cls(parts, n_bytes, int.from_bytes(digest.digest()), blank)


class Documents(Protocol):
    """Documents that can be counted, and gone through any number of times."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Document]: ...


@dataclass
class FileDocuments:
    """The documents of files, in order, blank ones left out. They are read anew whenever they are gone through.

    Raises ValueError, then, if a file cannot be read, or a row has no text.
    """

    paths: list[Path]
    _texts: dict[Path, Document] = field(default_factory=dict)  # of .txt files, measured the first time

    def __iter__(self) -> Iterator[Document]:
        for path in self.paths:
            for document in self._documents(path):
                if not document.blank:
                    yield document

    def _documents(self, path: Path) -> Iterator[Document]:
        if kind_of(path) != ".txt":
            for row in _rows(path):
                yield Document.of((row,))
            return
        if path not in self._texts:
            self._texts[path] = Document.of(_TextFile(path))
        yield self._texts[path]


def kind_of(path: Path) -> str | None:
    """What a file holds by its name: ``.txt``, ``.jsonl``, ``.parquet`` or None of these."""
    name = path.name.lower()
    for kind, endings in ((".txt", (".txt", ".txt.gz")), (".jsonl", (".jsonl", ".jsonl.gz")), (".parquet", ".parquet")):
        if name.endswith(endings):
            return kind
    return None


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


@dataclass(frozen=True)
class _TextFile:
    """The text of a .txt file, in parts."""

    path: Path

    def __iter__(self) -> Iterator[str]:
        return _named(self.path, self._parts(), "character", PART)

    def _parts(self) -> Iterator[str]:
        with io.TextIOWrapper(_opened(self.path), encoding="utf-8-sig") as file:
            yield from iter(partial(file.read, PART), "")


def _named(path: Path, items: Iterator[Item], unit: str, size: int) -> Iterator[Item]:
    """The items of a file, each ``size`` units. Raises ValueError, which says where, for what cannot be read."""
    from pyarrow import ArrowException

    done = 0
    try:
        for item in items:
            yield item
            done += size
    except (OSError, EOFError, zlib.error, UnicodeError, JSONDecodeError, RecursionError, ArrowException) as error:
        where = f" beyond {unit} {done}" if done else ""
        raise ValueError(f"data file {path} cannot be read{where} ({one_line(error)}).") from error


def _rows(path: Path) -> Iterator[str]:
    reader = _texts_of_jsonl if kind_of(path) == ".jsonl" else _texts_of_parquet
    for number, text in enumerate(_named(path, reader(path), "row", 1), start=1):
        if not isinstance(text, str):
            raise ValueError(f"data file {path}: column text must hold strings. Row {number} has {text!r:.40}.")
        yield text


def _opened(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb")


def _texts_of_jsonl(path: Path) -> Iterator[object]:
    with _opened(path) as file:
        for number, line in enumerate(iter(partial(file.readline, LONGEST_ROW + 1), b""), start=1):
            if len(line) > LONGEST_ROW:
                raise ValueError(f"data file {path}: row {number} must have at most {LONGEST_ROW:,} bytes. Got more.")
            text = line.decode("utf-8-sig")  # files that begin with a byte-order mark may have been joined
            try:
                row = json.loads(text) if text.strip() else {"text": ""}
            except JSONDecodeError:
                raise
            except ValueError as error:  # a number of thousands of digits
                raise ValueError(f"data file {path}: row {number} cannot be read ({one_line(error)}).") from error
            if not isinstance(row, dict):
                raise ValueError(f"data file {path}: row {number} must be a JSON object. Got {row!r:.40}.")
            if "text" not in row:
                raise _no_text_column(path, number, list(row))
            if isinstance(row["text"], str):
                row["text"].encode()  # "\ud800" is JSON and no text
            yield row["text"]


def _texts_of_parquet(path: Path) -> Iterator[object]:
    """In batches of few rows, from a buffer: a group of rows may be larger than memory."""
    import pyarrow.parquet

    if path.stat().st_size == 0:
        return
    with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20) as file:
        if "text" not in file.schema_arrow.names:
            raise _no_text_column(path, 1, file.schema_arrow.names)
        for batch in file.iter_batches(batch_size=256, columns=["text"]):
            yield from batch.column(0).to_pylist()


def _no_text_column(path: Path, row: int, names: list[str]) -> ValueError:
    return ValueError(f"data file {path}: row {row} must have a column named text. Found {', '.join(names)}.")
