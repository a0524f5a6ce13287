"""Windows over a token array, and which windows make up the batch of a step."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from looped.supervision import IGNORE_INDEX


@dataclass(frozen=True)
class Windows:
    """Windows of ``seq_len`` + 1 tokens, ``stride`` apart: window i is tokens[i*stride : i*stride + seq_len + 1].

    Its length counts those that have all their tokens.
    """

    tokens: np.ndarray
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

    Every epoch is a permutation of all windows seeded by (seed, epoch); step s takes samples s*batch_size onwards, so
    a batch may end one epoch and begin the next.
    """
    samples = range(step * batch_size, (step + 1) * batch_size)
    return np.array([_permutation(n_windows, seed, sample // n_windows)[sample % n_windows] for sample in samples])


@lru_cache(maxsize=2)
def _permutation(n_windows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n_windows)


def evaluation_windows(tokens: np.ndarray, seq_len: int, limit: int | None) -> tuple[Windows, np.ndarray]:
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
