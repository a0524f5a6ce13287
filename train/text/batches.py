"""Windows over a token array, and which windows make up the batch of a step."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from looped.supervision import IGNORE_INDEX
from train.text.shards import Shards

HELD_IN_MEMORY = 1 << 24  # windows whose order is held as an array, of 128 MiB; it decides the order, so it stays
ROUNDS = 6  # of the Feistel network


@dataclass(frozen=True)
class Windows:
    """Windows of ``seq_len`` + 1 tokens, ``stride`` apart: window i is tokens[i*stride : i*stride + seq_len + 1].

    Its length counts those that have all their tokens.
    """

    tokens: np.ndarray | Shards
    seq_len: int
    stride: int

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - self.seq_len - 1) // self.stride + 1)

    def gather(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, int64 [B, seq_len] each, of the windows [B]; targets are one token ahead.

        A window that reaches beyond the last token is filled up: with that token as input and IGNORE_INDEX as target.
        """
        positions = indices[:, None] * self.stride + np.arange(self.seq_len + 1)
        rows = self.tokens[np.minimum(positions, len(self.tokens) - 1)].astype(np.int64)
        targets = np.where(positions < len(self.tokens), rows, IGNORE_INDEX)[:, 1:]
        return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(targets.copy())


def batch_indices(n_windows: int, *, seed: int, step: int, batch_size: int) -> np.ndarray:
    """Windows [batch_size] int64 of optimisation step ``step`` (from 0): a function of its arguments alone.

    Every epoch is a permutation of all windows that belongs to (seed, epoch). Step s takes samples s*batch_size
    onwards, so a batch may end one epoch and begin the next.
    """
    epochs, positions = np.divmod(step * batch_size + np.arange(batch_size), n_windows)
    indices = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs).tolist():
        indices[epochs == epoch] = _shuffled(n_windows, seed, epoch, positions[epochs == epoch])
    return indices


def share(n_rows: int, *, rank: int, world: int) -> slice:
    """The rows of a batch that process ``rank`` of ``world`` takes. Every row is taken once."""
    return slice(rank * n_rows // world, (rank + 1) * n_rows // world)


def _shuffled(n: int, seed: int, epoch: int, positions: np.ndarray) -> np.ndarray:
    """What is at ``positions`` of the permutation of range(n) that belongs to (seed, epoch).

    A permutation of many windows is not held in memory. Each of its places is computed: a Feistel network permutes a
    power of four that is at least n, and what falls outside of range(n) goes through it again until it is inside
    (Black & Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    if n <= HELD_IN_MEMORY:
        return _permutation(n, seed, epoch)[positions]
    half = ((n - 1).bit_length() + 1) // 2
    keys = np.random.default_rng((seed, epoch)).integers(1 << 64, size=ROUNDS, dtype=np.uint64)
    found = _feistel(positions.astype(np.uint64), half, keys)
    while (outside := found >= n).any():
        found[outside] = _feistel(found[outside], half, keys)
    return found.astype(np.int64)


def _feistel(numbers: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of the numbers of 2*``half`` bits. All are uint64."""
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = numbers >> bits, numbers & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right + key) & mask)
    return left << bits | right


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Numbers of which every bit depends on all bits of these: SplitMix64's last step (Steele et al. 2014)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


@lru_cache(maxsize=2)
def _permutation(n_windows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n_windows)


def evaluation_windows(tokens: np.ndarray | Shards, seq_len: int, limit: int | None) -> tuple[Windows, np.ndarray]:
    """Windows that share no target, and which of them to evaluate on: int64, in order.

    Without ``limit``, or with at least as many, every token but the first is a target once; the last window may be
    filled up. Otherwise about ``limit`` targets, at least a window: whole windows, spread evenly over the tokens.
    """
    windows = Windows(tokens, seq_len, seq_len)
    n_targets = len(tokens) - 1
    if limit is None or limit >= n_targets:
        return windows, np.arange(-(-n_targets // seq_len))
    return windows, spread(len(windows), max(1, limit // seq_len))


def spread(n_windows: int, limit: int) -> np.ndarray:
    """At most ``limit`` of the windows, evenly spread and in order: int64."""
    count = min(limit, n_windows)
    return np.arange(count) * n_windows // count
