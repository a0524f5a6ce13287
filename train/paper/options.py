"""What the command lines of this package have in common: rules for options, and words for another program."""

from collections.abc import Sequence
from typing import Any


def check_distinct(options: Any, *names: str) -> None:
    """Raise ValueError unless each of these options has values, and none of them twice."""
    for name in names:
        values = getattr(options, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} must be at least one, and each only once. Got {' '.join(map(str, values))}.")


def check_positive(options: Any, *names: str) -> None:
    """Raise ValueError unless each of these options, and every one of several values, is at least 1."""
    for name in names:
        value = getattr(options, name)
        if min(value if isinstance(value, tuple) else [value]) < 1:
            raise ValueError(f"{name} must be at least 1. Got {name}={value}.")


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options of a command, and what follows the first `` -- ``."""
    words = list(words)
    end = words.index("--") if "--" in words else len(words)
    return words[:end], words[end + 1 :]
