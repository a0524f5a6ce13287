"""Text and the tokens of a run, and tokens as text while they come."""

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from looped.run_directory import TOKENIZER
from looped.tokenizer_file import read_tokenizer_file

UNFINISHED = "\ufffd"  # what decoding puts for the bytes of a character that are not all there


def read_tokenizer(run: Path) -> tokenizers.Tokenizer:
    """The tokenizer of the run in this directory. Raises ValueError if there is none, or it is damaged."""
    path = run / TOKENIZER
    if not path.is_file():
        raise ValueError(f"a run must have a tokenizer to read and write text. {path} is missing.")
    tokenizer = read_tokenizer_file(path)
    tokenizer.encode_special_tokens = True  # "<eos>" in the text is text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class TextStream:
    """The text that tokens add to the tokens before them, in whole characters.

    A token may end within a character, whose text comes with the token that completes it.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._given = ""

    def add(self, tokens: Sequence[int]) -> str:
        self._tokens += tokens
        whole = self._decoded()
        return "" if whole.endswith(UNFINISHED) else self._rest(whole)

    def end(self) -> str:
        """What was held back: bytes that no character completes, if there are any."""
        return self._rest(self._decoded())

    def _decoded(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=False))

    def _rest(self, whole: str) -> str:
        rest = whole[len(self._given) :]
        self._given = whole
        return rest
