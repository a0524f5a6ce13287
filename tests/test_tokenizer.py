import re
from collections import Counter

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import text
from tokenizers import models, pre_tokenizers

from train.corpus import load_corpus
from train.tokenizer import PAPER_REGEX, PAPER_SPECIALS, load_tokenizer, pieces, train_bpe, train_paper

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


def test_bpe_special_token_in_the_text_is_text(bpe):
    (ids,) = bpe.encode(["a<eos>b"])
    assert bpe.eos not in ids
    assert bpe.decode(ids) == "a<eos>b"
    assert bpe.bytes_per_token[bpe.eos] == 0


def test_bpe_has_the_size_asked_for_and_is_deterministic(bpe):
    assert bpe.vocab_size == 320
    assert bpe.lossless
    assert train_bpe(DOCUMENTS, 320).model.to_str() == bpe.model.to_str()


@pytest.mark.parametrize(
    ("vocab_size", "message"), [(256, "at least 257"), (100_000, r"at most \d+, .* Got vocab_size=")]
)
def test_bpe_vocabulary_out_of_range(vocab_size, message):
    with pytest.raises(ValueError, match=message):
        train_bpe(DOCUMENTS, vocab_size)


def test_paper_words_are_those_of_the_regex(paper):
    sample = load_corpus("sotu").validation[-1] + "café, naïve—x_1  \n\n\t don't"
    found = [word for word, _ in paper.model.pre_tokenizer.pre_tokenize_str(sample)]
    assert found == re.findall(PAPER_REGEX, sample)


def test_paper_vocabulary_is_the_most_frequent_words(paper):
    counts = Counter(word for document in DOCUMENTS for word in re.findall(PAPER_REGEX, document))
    top = sorted(counts, key=lambda word: (-counts[word], word))[: 100 - len(PAPER_SPECIALS)]
    assert set(paper.model.get_vocab()) == {*PAPER_SPECIALS, *top}
    assert [paper.model.token_to_id(token) for token in PAPER_SPECIALS] == [0, 1, 2, 3]
    assert not paper.lossless


def test_paper_words_must_occur_twice():
    with pytest.raises(ValueError, match=r"at most 6, "):  # four special tokens, "a" and " "
        train_paper(["a a b c"], 7)
    assert train_paper(["a a b c"], 6).encode(["a b"])[0].tolist() == [5, 4, 3]  # b is <unk>


def test_saved_tokenizers_load(bpe, paper, tmp_path):
    path = tmp_path / "tokenizer.json"
    for made in (bpe, paper):
        made.model.save(str(path))
        loaded = load_tokenizer(path, DOCUMENTS)
        assert (loaded.eos, loaded.vocab_size, loaded.lossless) == (made.eos, made.vocab_size, made.lossless)
        assert np.array_equal(loaded.encode(["so <eos> it\n\nis"])[0], made.encode(["so <eos> it\n\nis"])[0])


def test_unusable_tokenizers(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(path, DOCUMENTS)
    model = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.save(str(path))
    with pytest.raises(ValueError, match="ends a document: one of <eos>"):
        load_tokenizer(path, DOCUMENTS)


def test_tokenizer_that_changes_text_is_not_lossless(bpe, tmp_path):
    bpe.model.save(str(tmp_path / "tokenizer.json"))
    model = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    model.normalizer = tokenizers.normalizers.Lowercase()
    model.save(str(tmp_path / "lower.json"))
    assert load_tokenizer(tmp_path / "lower.json", ["only small"]).lossless
    assert not load_tokenizer(tmp_path / "lower.json", ["With a capital"]).lossless


def test_cutting_a_document_does_not_change_its_tokens(bpe, paper):
    document = DOCUMENTS[0]
    parts = list(pieces(document, 700))
    assert len(parts) > 10
    assert "".join(parts) == document
    for tokenizer in (bpe, paper):
        assert np.array_equal(np.concatenate(tokenizer.encode(parts)), tokenizer.encode([document])[0])
    assert list(pieces("x" * 10, 4)) == ["xxxx", "xxxx", "xx"]
