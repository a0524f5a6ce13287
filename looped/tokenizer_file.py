"""A tokenizer.json, read. Whatever is wrong with one is a ValueError of one line."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tokenizers

from looped.whole_file import regular

# The largest published vocabularies have about a million tokens. The library reserves memory for as many as are asked
# for, or as the largest id says, and where it gets none it aborts the process.
MAX_VOCAB_SIZE = 1 << 20


def read_tokenizer_file(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of the ``tokenizers`` library that a file holds. Raises ValueError if it cannot be read, or
    an id is beyond any vocabulary."""
    with refusing(f"tokenizer {path} cannot be read"), _without_panics():
        tokenizer = tokenizers.Tokenizer.from_file(str(regular(path)))
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= MAX_VOCAB_SIZE:
        raise ValueError(f"tokenizer {path} must have ids below {MAX_VOCAB_SIZE:,}. Got {largest}.")
    return tokenizer


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turns what the library raises into a ValueError: bare Exception, and Rust's panics, which are not even that."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what} ({' '.join(str(error).split()):.200}).") from error


@contextmanager
def _without_panics() -> Iterator[None]:
    """Rust writes of a panic itself, over many lines, to the descriptor of standard error."""
    try:
        stderr = os.dup(2)
    except OSError:  # closed
        yield
        return
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
