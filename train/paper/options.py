"""What the command lines of this package have in common: rules for options, and words for another program."""

from collections.abc import Sequence
from typing import Any


def check_options(options: Any, *, distinct: Sequence[str] = (), positive: Sequence[str] = ()) -> None:
    """Raise ValueError for an option that breaks its rule.

    distinct: names of options that need a value, and none twice. positive: of those that must be at least 1, every one
    of several values.
    """
    for name in positive:
        value = getattr(options, name)
        if min(value if isinstance(value, tuple) else [value]) < 1:
            raise ValueError(f"{name} must be at least 1. Got {name}={value}.")
    for name in distinct:
        values = getattr(options, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} must be at least one, and each only once. Got {' '.join(map(str, values))}.")


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options of a command, and what follows the first `` -- ``."""
    words = list(words)
    end = words.index("--") if "--" in words else len(words)
    return words[:end], words[end + 1 :]
