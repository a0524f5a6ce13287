"""p-hop: follow a pointer p times. The answer takes p look-ups, each of which needs the answer of the one before.

A sequence is a permutation f of `SYMBOLS` symbols, listed in order, and then a group of queries for each number of
hops, every symbol x once in a random order:

    inputs    f(0) .. f(7)  |  x x x x x x x x  |  x x x x x x x x  | ..
    targets   none          |  f(x)             |  f(f(x))          | ..  f^p(x)

The place in the sequence says what a token is: the symbol that f maps to this place, or a query of so many hops.
Symbols are the whole vocabulary. f is drawn anew for every sequence, uniformly from all permutations. So is the order
of each group.

Training begins with one hop and adds another every `CURRICULUM` steps. The queries of more hops are there from the
beginning, without targets. Where all hops are asked for at once, training stays for hundreds of steps at two hops
answered and three not.

A layer of attention does a look-up, so that a model of one layer needs p loops, or fewer if it follows several
pointers at once: composing what it has found reaches 2^k hops in k steps (Sanford, Hsu and Telgarsky, arXiv 2402.09268,
whose p-hop follows repeated tokens instead of a list; Saunshi et al., arXiv 2502.17416, train looped models on it).
Without any look-up an answer is right as often as symbols can be guessed: that f^p(x) is x again has probability 1/8
for one hop and 3/8 for four.
"""

from dataclasses import dataclass

import numpy as np

SYMBOLS = 8
CURRICULUM = 200  # steps


@dataclass(frozen=True)
class PHop:
    """The task with as many hops as sequences of ``seq_len`` tokens hold. Raises ValueError for another length."""

    seq_len: int

    name = "p-hop"
    vocab_size = SYMBOLS

    def __post_init__(self) -> None:
        if self.seq_len % SYMBOLS or self.seq_len < 2 * SYMBOLS:
            raise ValueError(
                f"seq_len must be {SYMBOLS} (1 + hops) with data=p-hop: {2 * SYMBOLS}, {3 * SYMBOLS}, ... "
                f"Got seq_len={self.seq_len}."
            )

    @property
    def hops(self) -> int:
        return self.seq_len // SYMBOLS - 1

    @property
    def description(self) -> str:
        return f"{SYMBOLS} symbols, 1 to {self.hops} hops"

    def sequences(self, generator: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Queries and answers of ``n`` sequences: inputs [n, T]; targets [n, T - 8], of the last places."""
        symbols = np.broadcast_to(np.arange(SYMBOLS), (n, 1 + self.hops, SYMBOLS))
        listed, *queries = generator.permuted(symbols, axis=-1).swapaxes(0, 1)  # each [n, 8]
        answers = []
        reached = listed  # f^p of every symbol
        for query in queries:
            answers.append(np.take_along_axis(reached, query, axis=1))
            reached = np.take_along_axis(listed, reached, axis=1)
        return np.concatenate([listed, *queries], axis=1), np.concatenate(answers, axis=1)

    def asked(self, step: int) -> int:
        """How many of the targets, from the first on, step ``step`` of training has."""
        return SYMBOLS * min(self.hops, 1 + step // CURRICULUM)

    def accuracy(self, right: np.ndarray) -> dict[str, float]:
        """The shares of answers that are right, of all and of each number of hops. right: [n, T - 8] bool."""
        groups = right.reshape(len(right), self.hops, SYMBOLS)
        return {"answers": float(right.mean())} | {
            f"{hops + 1} hops" if hops else "1 hop": float(groups[:, hops].mean()) for hops in range(self.hops)
        }
