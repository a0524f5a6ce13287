"""Text to token ids and back.

- ``bpe``: byte-level byte-pair encoding; loses nothing.
- ``paper``: the word-level tokenizer of Sharma & Vu (arXiv 2606.24898): matches of ``\\s+|[A-Za-z0-9_]+|[^\\w\\s]``,
  so whitespace runs are tokens too; the most frequent ones that occur at least twice. It loses rare words (to
  ``<unk>``) and letters outside the regex, so its perplexity compares with nothing else.
- the path of a tokenizer.json of the ``tokenizers`` library.

Both trained kinds see the training split only, and of one beyond SAMPLE a sample. What the library takes long for runs
in a thread of its own, so that a signal is handled meanwhile. It works on as many texts at a time as there are cores.
"""

import json
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from looped.tokenizer_file import MAX_VOCAB_SIZE, read_tokenizer_file, refusing

PAPER_REGEX = r"\s+|[A-Za-z0-9_]+|[^\w\s]"
PAPER_SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>"]
# What tokenizers call the token that ends a document; the first one in the vocabulary is taken.
EOS_NAMES = ("<eos>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>", "[SEP]")
PIECE = 1 << 16  # characters of the text that one core encodes at a time
SAMPLE = 1 << 30  # bytes of text that a tokenizer is trained on at most
# A byte of a word takes about 70 in training, once for all places where the word occurs. Words of ordinary length are
# repeated; long ones (base64, DNA, a script without blanks) are not, and a gigabyte of them would fill any memory.
LONG_WORD = re.compile(r"\S{33,}")
LONG_WORDS = 1 << 24  # characters
# Bytes that bpe merges at most into one token. Every merge goes through every word that has its pair, so that the time
# grows with the length of the longest word too: blanks, letters or digits without end (DNA, base64) are cut here.
LONGEST_WORD = 512
# What a vocabulary holds at least: 256 bytes and <eos>; the special tokens and a word.
MIN_VOCAB_SIZE = {"bpe": 257, "paper": len(PAPER_SPECIALS) + 1}

Result = TypeVar("Result")


@dataclass(frozen=True)
class Tokenizer:
    """A ``tokenizers`` tokenizer, its end-of-document token and the bytes that each token stands for.

    ``byte_level``: its tokens are bytes, so that it may be lossless. ``vocab_size``: one more than the largest id.
    """

    name: str
    model: tokenizers.Tokenizer
    eos: int
    vocab_size: int
    byte_level: bool

    @cached_property
    def bytes_per_token(self) -> np.ndarray:
        """[V] int64: UTF-8 bytes that each token stands for; 0 for special tokens. For byte-level tokenizers only."""
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        added = self.model.get_added_tokens_decoder()
        for token, index in self.model.get_vocab(with_added_tokens=True).items():
            if index not in added:
                sizes[index] = len(token)  # the byte-level alphabet writes every byte as one character
            elif not added[index].special:
                sizes[index] = len(added[index].content.encode())
        return sizes

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text, int64, without special tokens. Raises ValueError for text that has none."""
        with refusing(f"tokenizer {self.name} cannot encode the text"):
            encodings = interruptibly(self.model.encode_batch_fast, texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]

    def gives_back(self, texts: list[str]) -> bool:
        """Whether decoding gives back exactly what is encoded, of each text."""
        return self.byte_level and [self.decode(ids) for ids in self.encode(texts)] == texts

    def decode(self, ids: np.ndarray) -> str:
        """The text of ids, special tokens included."""
        with refusing(f"tokenizer {self.name} cannot decode"):
            return str(self.model.decode(ids.tolist(), skip_special_tokens=False))


def check_vocab_size(tokenizer: str, vocab_size: int) -> None:
    """Raises ValueError unless some text could give ``tokenizer`` (bpe, paper or a path) so many tokens."""
    least = MIN_VOCAB_SIZE.get(tokenizer, 1)
    if not least <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size must be at least {least} and at most {MAX_VOCAB_SIZE:,} for the tokenizer {tokenizer}. "
            f"Got vocab_size={vocab_size}."
        )


def interruptibly(function: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
    """What ``function`` returns or raises. Signals are handled while it runs.

    Python handles signals in the main thread, and only between two of its own instructions: not in a call that takes
    minutes. An exception that a signal raises leaves the call behind, in a thread that does not outlive the program.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments, **options))
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)  # Windows handles signals only when a wait is over
    return future.result()


def pieces(parts: Iterable[str], size: int = PIECE) -> Iterator[str]:
    """A text in pieces of about ``size`` characters: so that one huge file is encoded in bounded memory, on all cores.

    Cut before a single blank between words, where bpe and paper begin a new token anyhow, so their ids do not depend
    on the cut; where there is none near, at ``size``. Nor do the pieces depend on the parts in which the text comes.
    """
    text = ""
    for part in chain(parts, [None]):  # None: the end
        text, start = text + (part or ""), 0
        longest = size if part is None else size + 1  # the character behind the cut is looked at too
        while len(text) - start > longest:
            end = _cut(text, start, size)
            yield text[start:end]
            start = end
        text = text[start:]
    yield text


def _cut(text: str, start: int, size: int) -> int:
    """Where the piece that begins at ``start`` ends."""
    end = start + size
    for candidate in range(end, max(start + size // 2, end - 10_000), -1):
        if text[candidate] == " " and len(text[candidate - 1 : candidate + 2].split()) == 2:
            return candidate
    return end


def sample(texts: Iterable[str], n_bytes: int) -> Iterator[str]:
    """The texts, of ``n_bytes`` all together; where that is more than SAMPLE, a part of them, evenly spread.

    Long words are left out once there have been LONG_WORDS characters of them.
    """
    kept = min(1.0, SAMPLE / max(1, n_bytes))
    n_long = 0
    for number, text in enumerate(texts):
        if int((number + 1) * kept) > int(number * kept):
            n_long += sum(map(len, LONG_WORD.findall(text)))
            yield text if n_long <= LONG_WORDS else LONG_WORD.sub("", text)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE with ``vocab_size`` tokens, ``<eos>`` among them.

    Raises ValueError if ``vocab_size`` is out of range, or the text has too few pairs to merge.
    """
    check_vocab_size("bpe", vocab_size)
    model = tokenizers.Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(f".{{1,{LONGEST_WORD}}}"), behavior="isolated")
    model.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False), cut])
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    return _trained("bpe", model, trainer, texts, vocab_size)


def train_paper(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Count the words of the paper's regex and keep the ``vocab_size`` most frequent, special tokens included.

    Raises ValueError if ``vocab_size`` is out of range, or fewer words occur twice.
    """
    check_vocab_size("paper", vocab_size)
    model = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    # Inverted: what the regex does not match is removed, as in re.findall.
    model.pre_tokenizer = pre_tokenizers.Split(Regex(PAPER_REGEX), behavior="removed", invert=True)
    model.decoder = decoders.Fuse()
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=PAPER_SPECIALS, show_progress=sys.stderr.isatty()
    )
    return _trained("paper", model, trainer, texts, vocab_size)


def _trained(
    name: str, model: tokenizers.Tokenizer, trainer: trainers.Trainer, texts: Iterable[str], vocab_size: int
) -> Tokenizer:
    interruptibly(model.train_from_iterator, texts, trainer)
    if model.get_vocab_size() < vocab_size:
        raise ValueError(
            f"vocab_size must be at most {model.get_vocab_size()}, which is all that the training text allows. "
            f"Got vocab_size={vocab_size}."
        )
    return _finish(name, model)


def load_tokenizer(path: Path, *, name: str | None = None) -> Tokenizer:
    """Load a tokenizer.json; ``name`` is for messages.

    Raises ValueError if it cannot be read or has no token that ends a document.
    """
    model = read_tokenizer_file(path)
    with refusing(f"tokenizer {path} cannot be read again once it is saved"):
        model = tokenizers.Tokenizer.from_str(model.to_str())  # cache and run keep it as the library writes it
    return _finish(name or str(path), model)


def _finish(name: str, model: tokenizers.Tokenizer) -> Tokenizer:
    model.encode_special_tokens = True  # "<eos>" in the text is text
    model.no_truncation()  # a tokenizer.json may ask for either; a corpus is neither cut nor filled up
    model.no_padding()
    vocabulary = model.get_vocab(with_added_tokens=True)
    eos = next((vocabulary[token] for token in EOS_NAMES if token in vocabulary), None)
    if eos is None:
        raise ValueError(f"tokenizer {name} must have a token that ends a document: one of {', '.join(EOS_NAMES)}.")
    byte_level = "ByteLevel" in json.dumps(json.loads(model.to_str())["decoder"])
    return Tokenizer(name, model, eos, max(vocabulary.values()) + 1, byte_level)
