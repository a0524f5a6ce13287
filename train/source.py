"""What a run trains on: a source of inputs and targets. Text is one kind, tasks (train/tasks/) are the other.

The training loop sees `Source` alone.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor

from looped.run_directory import write_tokenizer, write_validation
from train.text.batches import Windows, batch_indices, evaluation_windows, share
from train.text.data import TokenData

if TYPE_CHECKING:
    from train.tasks.task import Task


class Sequences(Protocol):
    """Inputs and targets, int64 [B, T] each, of the sequences with the numbers ``indices``."""

    def gather(self, indices: np.ndarray) -> tuple[Tensor, Tensor]: ...


class Source(ABC):
    """Inputs and targets [B, T] of every training step and of validation; a target that does not count is -100.

    fingerprint: tells this source from another, so that a run is continued on what it was begun with. bytes_per_token:
    [V] UTF-8 bytes that each token stands for; None where that is not defined. n_tokens, n_sequences: of the training
    split, an epoch; None where there is no end to it. task: what is done with the answers, where targets are answers.
    """

    vocab_size: int
    fingerprint: str
    description: str
    bytes_per_token: np.ndarray | None = None
    n_tokens: int | None = None
    n_sequences: int | None = None
    task: "Task | None" = None

    @abstractmethod
    def batch(self, step: int, *, seed: int, batch_size: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
        """Inputs and targets of step ``step``, from 0: a function of the arguments alone.

        ``batch_size``: of all processes together. Process ``rank`` of ``world`` gets its `train.text.batches.share`.
        """

    @abstractmethod
    def validation(self, limit: int | None) -> tuple[Sequences, np.ndarray]:
        """Sequences, and which of them to evaluate on so that there are about ``limit`` targets; None: all."""

    @abstractmethod
    def write(self, out: Path) -> None:
        """Leave in a run's directory what its reader needs of this."""


class Text(Source):
    """Text as a source: the next token is the target of each."""

    def __init__(self, name: str, data: TokenData, windows: Windows) -> None:
        """``name``: of the text."""
        self.data, self.windows = data, windows
        self.vocab_size = data.tokenizer.vocab_size
        self.fingerprint = data.fingerprint
        self.description = f"{name}, {Path(data.tokenizer.name).name} tokenizer ({self.vocab_size:,} tokens)"
        self.bytes_per_token = data.tokenizer.bytes_per_token if data.lossless else None
        self.n_tokens, self.n_sequences = len(data.train.tokens), len(windows)

    def batch(self, step: int, *, seed: int, batch_size: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
        indices = batch_indices(len(self.windows), seed=seed, step=step, batch_size=batch_size)
        return self.windows.gather(indices[share(batch_size, rank=rank, world=world)])

    def validation(self, limit: int | None) -> tuple[Windows, np.ndarray]:
        return evaluation_windows(self.data.validation.tokens, self.windows.seq_len, limit)

    def write(self, out: Path) -> None:
        write_tokenizer(out, self.data.tokenizer.model.to_str(pretty=True))
        validation = self.data.validation
        tokens, bounds = np.asarray(validation.tokens), np.asarray(validation.bounds)
        write_validation(out, tokens, bounds, bytes_per_token=self.bytes_per_token)
