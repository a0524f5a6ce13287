"""Data files and tokenizers that are damaged or lie: they are read, or refused in one line that leaves no cache."""

import gzip
import io
import json
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hostile import ODD, assert_says_why, bounded, contents, damaged_bytes, drawn, lying
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import text

from train.text.data import load_data
from train.text.tokenizer import load_tokenizer, train_bpe, train_paper

TEXT = text(400)
DOCUMENTS = [text(60, seed) for seed in range(8)]
MARKS = [
    "\x00",
    "\ufeff",
    "\u2028",
    "\r\n",
    "\r",
    " " * 2000,
    "é" * 500,
    "a" * 5000,
    "\U0001f600",
    "<eos>",
    "\u202e",
    "'",
    '"',
]
ROWS = [{"body": "x"}, {"text": "x", "": [[]]}, {"text": "\ud800"}]
LINES = ["", " ", "NaN", "[" * 5000, '{"text": ' * 3000, "{'text': 1}", '{"text": "x"', '{"text": "a", "text": "b"}',
         '{"text": ' + "9" * 5000 + "}"]  # fmt: skip


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def assert_read_or_refused(data: Path, tokenizer: str, vocab_size: int | None) -> None:
    """Encoded, every token in the vocabulary; or refused, and the cache not begun."""
    cache = data.parent / "cache"
    with bounded():
        try:
            found = load_data(str(data), tokenizer=tokenizer, vocab_size=vocab_size, seq_len=4, cache=cache)
        except ValueError as error:
            assert_says_why(error)
            assert not cache.exists()
            return
    for split in (found.train, found.validation):
        tokens, bounds = np.asarray(split.tokens), np.asarray(split.bounds)
        assert len(tokens) > 4
        assert int(tokens.max()) < found.tokenizer.vocab_size
        assert (bounds[0], bounds[-1]) == (0, len(tokens))
        assert (tokens[bounds[1:] - 1] == found.tokenizer.eos).all()
        if found.lossless:
            assert found.tokenizer.bytes_per_token[tokens].sum() > 0


def row(draw: random.Random) -> Any:
    if draw.random() < 0.6:
        return {"text": draw.choice(DOCUMENTS + MARKS)}
    return draw.choice([{"text": draw.choice(ODD)}, draw.choice(ODD), *ROWS])


def jsonl(draw: random.Random) -> bytes:
    rows = [json.dumps(row(draw)) for _ in range(draw.randint(0, 12))]
    rows += draw.choices(LINES, k=draw.randint(0, 2))
    draw.shuffle(rows)
    return draw.choice(["\n", "\r\n", "\n\n"]).join(rows).encode("utf-8", "surrogatepass")


def parquet(draw: random.Random) -> bytes:
    columns: list[Any] = [
        DOCUMENTS,
        [*DOCUMENTS, None],
        [1, 2, 3],
        [b"\xff\xfe", b"bytes"],
        [["a"], ["b"]],
        [{"a": 1}],
        [True, None],
        [],
        [1.5],
    ]
    column = draw.choice(columns)
    names = draw.choice([["text"], ["text"], ["body"], ["Text"], ["text", "text"], [""]])
    file = io.BytesIO()
    table = pyarrow.Table.from_arrays([pyarrow.array(column)] * len(names), names=names)
    pyarrow.parquet.write_table(table, file, compression=draw.choice(["none", "zstd", "snappy"]))
    return file.getvalue()


def txt(draw: random.Random) -> bytes:
    return "".join(draw.choices([TEXT[:200], *MARKS], k=draw.randint(0, 20))).encode()


KINDS = {".txt": txt, ".jsonl": jsonl, ".parquet": parquet}


@given(seed=st.integers(0, 2**32), kind=st.sampled_from(sorted(KINDS)), packed=st.booleans(), damage=st.booleans())
@drawn(30)
def test_data_files(seed, kind, packed, damage):
    draw = random.Random(seed)
    content = KINDS[kind](draw)
    if damage:
        content = damaged_bytes(content, draw)
    name = f"text{kind}"
    if packed and kind != ".parquet":
        content, name = gzip.compress(content), f"{name}.gz"
        content = damaged_bytes(content, draw) if draw.randrange(2) else content
    with folder() as place:
        (place / name).write_bytes(content)
        assert_read_or_refused(place / name, "bpe", 260)


# Tokenizers -----------------------------------------------------------------------------------------------------------

BPE = json.loads(train_bpe([TEXT], 270).model.to_str())
PAPER = json.loads(train_paper([TEXT], 40).model.to_str())
TOKEN = {"id": 0, "content": "<eos>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}  # fmt: skip
PARTS_OF_ONE: dict[str, list[Any]] = {
    "normalizer": [
        {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000},
        {"type": "Replace", "pattern": {"Regex": "("}, "content": ""},
        {"type": "Replace", "pattern": {"String": ""}, "content": "x"},
        {"type": "Replace", "pattern": {"Regex": "."}, "content": ""},
        {"type": "Prepend", "prepend": "x" * 100},
        {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, {"type": "NFKD"}, {"type": "StripAccents"}]},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        {"type": "Nonsense"},
    ],
    "pre_tokenizer": [
        None,
        {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Removed", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "Sequence", "pretokenizers": []},
    ],
    "decoder": [
        None,
        {"type": "Fuse"},
        {"type": "ByteLevel", "add_prefix_space": 1},
        {"type": "Sequence", "decoders": []},
    ],
    "post_processor": [
        {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
        {"type": "BertProcessing", "sep": ["x", 10**9], "cls": ["y", 0]},
    ],
    "truncation": [
        {"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        {"max_length": -1},
    ],
    "padding": [{"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}],
    "added_tokens": [
        [],
        [TOKEN | {"id": 5}],
        [TOKEN, TOKEN],
        [TOKEN | {"id": 2**31}],
        [TOKEN | {"id": 2**32 - 1, "content": "x"}],
        [TOKEN | {"id": -1}],
        [TOKEN | {"content": ""}],
        [TOKEN, TOKEN | {"id": 1, "content": "a", "special": False}],
        [TOKEN, TOKEN | {"id": 10**6, "content": "e"}],
    ],
    "model": [
        None,
        {},
        {"type": "WordLevel", "vocab": {"<eos>": 0}, "unk_token": "<unk>"},
        {"type": "WordLevel", "vocab": {"<eos>": 0, "<unk>": 0}, "unk_token": "<unk>"},
        {"type": "WordLevel", "vocab": {"<eos>": 2**32 - 1, "<unk>": 7}, "unk_token": "<unk>"},
        {"type": "WordLevel", "vocab": {}, "unk_token": "<eos>"},
        {"type": "BPE", "vocab": {"a": 0, "<eos>": 1}, "merges": [["a", "a"]]},
        {"type": "BPE", "vocab": {"a": 0, "<eos>": 1, "aa": 0}, "merges": ["a a"]},
        {"type": "BPE", "vocab": {"a": 0, "<eos>": 1}, "merges": [], "dropout": 1.0},
        {"type": "BPE", "vocab": {"a": 0, "<eos>": 1}, "merges": [], "unk_token": "missing"},
        {"type": "Unigram", "vocab": [["<eos>", 0.0]], "unk_id": 7},
        {"type": "Unigram", "vocab": [["<eos>", float("-inf")], ["a", 1e308]], "unk_id": 0},
        {"type": "WordPiece", "vocab": {"<eos>": 0}, "unk_token": "[UNK]", "continuing_subword_prefix": "##",
         "max_input_chars_per_word": 0},
    ],
}  # fmt: skip


def tokenizer_that_lies(draw: random.Random) -> bytes:
    made = dict(draw.choice([BPE, PAPER]))
    for _ in range(draw.randint(1, 2)):
        part = draw.choice(sorted(PARTS_OF_ONE))
        made[part] = draw.choice(PARTS_OF_ONE[part])
    if draw.randrange(3) == 0:
        made = lying(made, draw)
    content = json.dumps(made).encode()
    return damaged_bytes(content, draw) if draw.randrange(4) == 0 else content


@given(seed=st.integers(0, 2**32), vocab_size=st.sampled_from([None, None, 1, 300, 1 << 20]))
@drawn(30)
def test_tokenizers(seed, vocab_size):
    with folder() as place:
        (place / "text.txt").write_text(TEXT, encoding="utf-8")
        (place / "tokenizer.json").write_bytes(tokenizer_that_lies(random.Random(seed)))
        assert_read_or_refused(place / "text.txt", str(place / "tokenizer.json"), vocab_size)


# Found ----------------------------------------------------------------------------------------------------------------


def model_of(vocab: dict[str, int]) -> dict[str, Any]:
    return {"model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}, "added_tokens": []}


FOUND_TOKENIZERS = {
    "a panic while it is read": ({"normalizer": PARTS_OF_ONE["normalizer"][6]}, "cannot be read .Precompiled"),
    "an id beyond any vocabulary": (
        model_of({"<eos>": 0, "<unk>": 1, "a": 1 << 21}),
        "ids below 1,048,576. Got 2097152",
    ),
    "an id for which the library finds no memory": (
        {
            "added_tokens": [],
            "model": {
                "type": "WordPiece",
                "vocab": {"<eos>": 1 << 31, "[UNK]": 1},
                "unk_token": "[UNK]",
                "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 10,
            },
        },
        "ids below 1,048,576. Got 2147483648",
    ),
    "a word that is not in it": (model_of({"<eos>": 0}), "cannot encode the text .*Missing .UNK. token"),
    "another once it is saved": (
        {"model": {"type": "BPE", "vocab": {"<eos>": 0, "a": 1, "b": 2, "ab": 2}, "merges": [["a", "b"]]}},
        "cannot be read again once it is saved|must have a token|cannot be read",
    ),
}


@pytest.mark.parametrize("name", FOUND_TOKENIZERS)
def test_found_tokenizers(tmp_path, name):
    """What has once come out as another error, or after the cache was begun."""
    change, message = FOUND_TOKENIZERS[name]
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(json.dumps(PAPER | change))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load_data(
            str(tmp_path / "text.txt"),
            tokenizer=str(tmp_path / "tokenizer.json"),
            vocab_size=None,
            seq_len=4,
            cache=tmp_path / "cache",
        )
    assert_says_why(error.value)
    assert contents(tmp_path) == before


def test_a_panic_is_one_line_on_stderr(tmp_path, capfd):
    """Rust would write many of its own."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(PAPER | FOUND_TOKENIZERS["a panic while it is read"][0]))
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(tmp_path / "tokenizer.json")
    assert capfd.readouterr().err == ""


def test_a_number_of_thousands_of_digits(tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n{"text": ' + "9" * 5000 + "}\n")
    with pytest.raises(
        ValueError, match=r"data file .*text.jsonl: row 2 cannot be read \(ValueError: Exceeds the limit"
    ):
        load_data(str(tmp_path / "text.jsonl"), tokenizer="bpe", vocab_size=260, seq_len=4, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
