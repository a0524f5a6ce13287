"""The rows of a batch: what a step brings them, which have stopped, and how many tokens the others may still have."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Step(NamedTuple):
    """What a step has brought every row: no token if the row has stopped before.

    loops: of the logits that each token was drawn from. drafted, kept: tokens of every row that were drafted, and that
    stayed.
    """

    tokens: list[list[int]]
    loops: list[list[int]]
    drafted: int = 0
    kept: int = 0


class Rows:
    """Which rows of a batch have stopped, and how many tokens the others may still have."""

    def __init__(self, batch_size: int, max_new_tokens: int, stop_tokens: Sequence[int]) -> None:
        self.finished = [False] * batch_size
        self._remaining = max_new_tokens
        self._stop = frozenset(stop_tokens)

    @property
    def remaining(self) -> int:
        """New tokens that a row may still have; 0 if all rows have stopped."""
        return 0 if all(self.finished) else self._remaining

    def take(self, tokens: Tensor, loops: Sequence[int], *, drafted: int = 0, kept: int = 0) -> Step:
        """The step of new tokens [B, n], each after loops[row] loops; those after a stop token are left out."""
        self._remaining -= tokens.shape[1]
        taken: list[list[int]] = []
        for row, ids in enumerate(tokens.tolist()):
            end = next((i + 1 for i, token in enumerate(ids) if token in self._stop), len(ids))
            taken.append([] if self.finished[row] else ids[:end])
            self.finished[row] |= bool(taken[row]) and taken[row][-1] in self._stop
        counts = [[number] * len(ids) for number, ids in zip(loops, taken, strict=True)]
        return Step(taken, counts, drafted, kept)
