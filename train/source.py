"""What a run trains on: a source of inputs and targets. Text is one kind, tasks (train/tasks/) are the other.

The training loop sees `Source` alone.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from looped.run_directory import write_tokenizer, write_validation
from train.tasks.task import Task
from train.text.batches import Windows, batch_indices, evaluation_windows, share
from train.text.data import TokenData


class Sequences(Protocol):
    """Inputs and targets, int64 [B, T] each, of the sequences with the numbers ``indices``."""

    def gather(self, indices: np.ndarray) -> tuple[Tensor, Tensor]: ...


class Source(Protocol):
    """Inputs and targets [B, T] of every training step and of validation; a target that does not count is -100."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Tells this source from another, so that a run is continued on what it was begun with."""
        ...

    @property
    def description(self) -> str: ...

    @property
    def bytes_per_token(self) -> np.ndarray | None:
        """[V] UTF-8 bytes that each token stands for; None where that is not defined."""
        ...

    @property
    def n_tokens(self) -> int | None:
        """Tokens of the training split; None where there is no end to them."""
        ...

    @property
    def n_sequences(self) -> int | None:
        """Sequences of the training split, an epoch; None where there is no end to them."""
        ...

    @property
    def task(self) -> Task | None:
        """What is done with the answers, where targets are answers."""
        ...

    def batch(self, step: int, *, seed: int, batch_size: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
        """Inputs and targets of step ``step``, from 0: a function of the arguments alone.

        ``batch_size``: of all processes together. Process ``rank`` of ``world`` gets its `train.text.batches.share`.
        """
        ...

    def validation(self, limit: int | None) -> tuple[Sequences, np.ndarray]:
        """Sequences, and which of them to evaluate on so that there are about ``limit`` targets; None: all."""
        ...

    def write(self, out: Path) -> None:
        """Leave in a run's directory what its reader needs of this."""
        ...


@dataclass(frozen=True)
class Text:
    """Text as a source: the next token is the target of each. ``name``: of the text."""

    name: str
    data: TokenData
    windows: Windows

    task = None

    @property
    def vocab_size(self) -> int:
        return self.data.tokenizer.vocab_size

    @property
    def fingerprint(self) -> str:
        return self.data.fingerprint

    @property
    def description(self) -> str:
        return f"{self.name}, {Path(self.data.tokenizer.name).name} tokenizer ({self.vocab_size:,} tokens)"

    @property
    def bytes_per_token(self) -> np.ndarray | None:
        return self.data.tokenizer.bytes_per_token if self.data.lossless else None

    @property
    def n_tokens(self) -> int:
        return len(self.data.train.tokens)

    @property
    def n_sequences(self) -> int:
        return len(self.windows)

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
