"""Addition: two numbers of up to n digits are added, and all digits of the sum are asked for at once.

A sequence is the digits of a, those of b, and n + 1 tokens "=", at which the digits of a + b are the targets:

    inputs    a_0 .. a_{n-1}   b_0 .. b_{n-1}   =   ..  =
    targets   none             none             s_0 .. s_n

Every number begins with its units (digits in this order are easier to learn: Lee et al., arXiv 2307.03381; McLeish et
al., arXiv 2405.17399, who add with looped models) and is filled up with zeros. How many digits a has is drawn
uniformly from 1..n, and then each digit from 0..9; b likewise and independently.

No digit of the sum is ever an input, so that a carry has to travel inside the model: it may need one step for each
place that it passes, or fewer where places are looked at together.
"""

from dataclasses import dataclass

import numpy as np

BASE = 10
EQUALS = BASE  # the token after those of the digits


@dataclass(frozen=True)
class Addition:
    """The task with as many digits as sequences of ``seq_len`` tokens hold. Raises ValueError for another length."""

    seq_len: int

    name = "addition"
    vocab_size = BASE + 1

    def __post_init__(self) -> None:
        if self.seq_len % 3 != 1 or self.seq_len < 4:
            raise ValueError(
                f"seq_len must be 3 digits + 1 with data=addition: 4, 7, 10, ... Got seq_len={self.seq_len}."
            )

    @property
    def digits(self) -> int:
        return self.seq_len // 3

    @property
    def description(self) -> str:
        return f"two numbers of 1 to {self.digits} digits"

    def sequences(self, generator: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Questions and answers of ``n`` sequences: inputs [n, T]; targets [n, digits + 1], of the last places."""
        lengths = generator.integers(1, self.digits, size=(n, 2, 1), endpoint=True)
        numbers = generator.integers(BASE, size=(n, 2, self.digits))
        numbers[np.arange(self.digits) >= lengths] = 0
        sums = np.zeros((n, self.digits + 1), dtype=np.int64)
        for place in range(self.digits):
            total = numbers[:, :, place].sum(1) + sums[:, place]
            sums[:, place], sums[:, place + 1] = total % BASE, total // BASE
        return np.concatenate([numbers.reshape(n, -1), np.full_like(sums, EQUALS)], axis=1), sums

    def asked(self, step: int) -> int:
        """All targets, in every step of training."""
        return self.digits + 1

    def accuracy(self, right: np.ndarray) -> dict[str, float]:
        """The share of sums that are right in every digit, and the share of right digits. right: [n, digits + 1]."""
        return {"answers": float(right.all(axis=1).mean()), "digits": float(right.mean())}
